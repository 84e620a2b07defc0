"""Filling a module from a set of files that another number of ranks has written: of each file what is needed, no more.

Bytes are read chunk by chunk, since checksums are of whole chunks, into memory of their own on the module's device, and
go from there to where they belong: what a rank needs of a matrix that is divided by columns lies in pieces all over the
file's. A few hundred megabytes are on their way at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import MismatchError, UnsupportedError
from ..format.chunks import Chunk
from ..format.dtypes import ITEM_SIZE
from ..format.index import TENSOR, Index, Tensor
from ..format.snapshot import Snapshot
from ..transport.kept_helpers import KeptHelpers
from ..transport.source import Source
from .division import Division, Slice, local_size, slices
from .layout import check_storable, dtype_name
from .open import Opened
from .reading import Reading, RestoreOptions, reading
from .restore import RestoreReport, restore

BATCH = 512 << 20
"""Bytes on their way at a time; twice as many where rows of one tensor have more than that."""


@dataclass(frozen=True)
class Ranks:
    """Who takes from whom.

    Attributes:
        old: tensor-parallel ranks that have written the set.
        new: those of the engine.
        rank: this one of them.
    """

    old: int
    new: int
    rank: int


@dataclass(frozen=True)
class Plan:
    """What a rank takes from which of the old ranks' files.

    Attributes:
        ranks: see there.
        divisions: by name.
        taken: by name, of tensors that are divided.
        zeros: by name, elements at the end that are zero.
    """

    ranks: Ranks
    divisions: Mapping[str, Division]
    taken: Mapping[str, Sequence[Slice]]
    zeros: Mapping[str, int]

    @property
    def files(self) -> list[int]:
        """The old ranks whose files are read."""
        found = {piece.rank for pieces in self.taken.values() for piece in pieces}
        return sorted(found | {self.whole_from})

    @property
    def whole_from(self) -> int:
        """The old rank from whose file comes what every rank holds."""
        return self.ranks.rank * self.ranks.old // self.ranks.new


def plan(divisions: Mapping[str, Division], ranks: Ranks) -> Plan:
    """For one rank.

    Raises:
        UnsupportedError: a parameter cannot be divided among so many.
    """
    taken, zeros = {}, {}
    for name, division in divisions.items():
        if division.dim is not None:
            try:
                taken[name], zeros[name] = slices(division, ranks.old, ranks.new, ranks.rank)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name!r}: {error}") from None
    return Plan(ranks, dict(divisions), taken, zeros)


def check(found: Plan, opened: Mapping[int, Opened], targets: Mapping[str, torch.Tensor], required: set[str]) -> None:
    """Hold every name, shape, dtype and tie of the files and of the module against each other, and against the plan.

    Args:
        opened: all old ranks' files, by rank, with their chunk tables.

    Raises:
        MismatchError: what differs, by name; nothing was copied.
    """
    first = opened[found.whole_from]
    _check_whole(found, opened)
    held = {tensor.name for tensor in first.snapshot.index.tensors}
    missing, extra = sorted(required - held), sorted(held - set(targets))
    if missing or extra:
        said = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the model does not have"
        raise MismatchError(f"{first.source.name!r} {said}; thaw it into the model it was frozen from")
    for rank, one in opened.items():
        if {tensor.name for tensor in one.snapshot.index.tensors} != held:
            raise MismatchError(f"{one.source.name!r} holds other tensors than {first.source.name!r}; freeze again")
        ties: dict[tuple[int, int], int] = {}
        for entry in one.snapshot.index.tensors:
            target = targets[entry.name]
            _check_shape(found, rank, entry, target, one.source.name)
            if entry.storage is None:
                continue
            if ties.setdefault((entry.storage, entry.offset), target.data_ptr()) != target.data_ptr():
                raise MismatchError(f"{one.source.name!r} ties {entry.name!r} to another tensor, the model does not")
        if len(set(ties.values())) != len(ties):
            raise MismatchError(f"the model ties tensors to each other that {one.source.name!r} holds apart")


def _check_whole(found: Plan, opened: Mapping[int, Opened]) -> None:
    """What is taken for the same on every rank is the same, by its checksums."""
    sums: dict[str, tuple[int, list[tuple[int, int, int]]]] = {}
    for rank, one in opened.items():
        chunks: dict[int, list[tuple[int, int, int]]] = {}
        for chunk in sorted(one.snapshot.chunks, key=lambda chunk: (chunk.storage, chunk.at)):
            chunks.setdefault(chunk.storage, []).append((chunk.length, chunk.xxh3, chunk.wordsum))
        for entry in one.snapshot.index.tensors:
            if entry.name not in found.divisions:
                raise MismatchError(f"{one.source.name!r} holds {entry.name!r}, which the model does not have")
            if found.divisions[entry.name].dim is None and entry.storage is not None:
                other, theirs = sums.setdefault(entry.name, (rank, chunks[entry.storage]))
                if chunks[entry.storage] != theirs:
                    raise MismatchError(
                        f"ranks {other} and {rank} of {one.source.name!r} hold different bytes as {entry.name!r}, of "
                        "which each should have all; thaw it by as many ranks"
                    )


def _check_shape(found: Plan, rank: int, entry: Tensor, target: torch.Tensor, file: str) -> None:
    division, ours = found.divisions[entry.name], tuple(target.shape)
    check_storable(entry.name, target)
    theirs, wanted = list(ours), list(ours)
    if division.dim is not None:
        theirs[division.dim] = local_size(division, found.ranks.old, rank)
        wanted[division.dim] = local_size(division, found.ranks.new, found.ranks.rank)
    if list(ours) != wanted:
        raise MismatchError(f"the model has {entry.name!r} as {list(ours)}, not as {wanted}; freeze again")
    if list(entry.shape) != theirs or entry.dtype != dtype_name(target.dtype):
        raise MismatchError(
            f"{file!r} holds {entry.name!r} as {entry.dtype} {list(entry.shape)}, which for this model were "
            f"{dtype_name(target.dtype)} {theirs}; thaw it into the model it was frozen from"
        )


def fill(
    found: Plan,
    opened: Mapping[int, Opened],
    targets: Mapping[str, torch.Tensor],
    options: RestoreOptions,
    kept: KeptHelpers | None = None,
) -> RestoreReport:
    """Fill ``targets`` in place; ``check`` has passed.

    Args:
        opened: the files that the plan names, by old rank; they stay the caller's.
        targets: every tensor, by name.
        kept: whose helpers and kernels to borrow.

    Raises:
        CorruptionError, StorageError, ReplacedError: part of the bytes may have been copied; do not use the tensors.
    """
    start = time.perf_counter()
    windows = {rank: list(_windows(found, rank, one.snapshot, targets)) for rank, one in opened.items()}
    whole = sum(window.stored for each in windows.values() for window in each)
    reports: list[RestoreReport] = []
    for rank, one in opened.items():
        done = sum(report.stored for report in reports)
        reports += _read(one, windows[rank], _after(options, done, whole), kept)
    with torch.no_grad():
        for name, count in found.zeros.items():
            if count:
                dim = found.divisions[name].dim
                assert dim is not None
                targets[name].narrow(dim, targets[name].shape[dim] - count, count).zero_()
    named = len(opened[found.whole_from].snapshot.index.tensors)
    return _summary(reports, opened, named, time.perf_counter() - start)


@dataclass(frozen=True)
class _Copy:
    """Elements of a file's tensor, and where they go.

    Attributes:
        entry: the tensor.
        pieces: dimension, first element and number of elements in it; of other dimensions all are meant.
        into: of the same shape.
    """

    entry: Tensor
    pieces: tuple[tuple[int, int, int], ...]
    into: torch.Tensor

    @property
    def shape(self) -> list[int]:
        """Of what is taken."""
        shape = list(self.entry.shape)
        for dim, _, length in self.pieces:
            shape[dim] = length
        return shape

    @property
    def begin(self) -> int:
        """Byte of the storage with which the first element begins."""
        before = sum(start * self.entry.stride[dim] for dim, start, _ in self.pieces)
        return self.entry.offset + before * ITEM_SIZE[self.entry.dtype]

    @property
    def end(self) -> int:
        """Byte of the storage after the last element."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.entry.stride, strict=True))
        return self.begin + (last + 1) * ITEM_SIZE[self.entry.dtype]

    def seen(self, memory: torch.Tensor, at: int) -> torch.Tensor:
        """The elements, in bytes of the storage from ``at`` on."""
        own = memory[self.begin - at : self.end - at].view(getattr(torch, self.entry.dtype))
        return own.as_strided(self.shape, self.entry.stride)


@dataclass(frozen=True)
class _Window:
    """Whole chunks of one storage, in order and without gaps, and what is needed of them."""

    chunks: tuple[Chunk, ...]
    copies: tuple[_Copy, ...]

    @property
    def begin(self) -> int:
        """Byte of the storage with which the first chunk begins."""
        return self.chunks[0].at

    @property
    def device(self) -> torch.device:
        """Where its bytes go."""
        return self.copies[0].into.device

    @property
    def bytes(self) -> int:
        """Of the chunks."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def stored(self) -> int:
        """Bytes of the file."""
        return sum(chunk.stored for chunk in self.chunks)


def _windows(found: Plan, rank: int, snapshot: Snapshot, targets: Mapping[str, torch.Tensor]) -> Iterator[_Window]:
    """What is needed of one file, in order of its place there."""
    chunks: dict[int, list[Chunk]] = {}
    for chunk in snapshot.chunks:
        chunks.setdefault(chunk.storage, []).append(chunk)
    copies: dict[int, list[_Copy]] = {}
    filled: set[int] = set()
    for entry in snapshot.index.tensors:
        target = targets[entry.name]
        if entry.storage is None or target.data_ptr() in filled:  # under another name
            continue
        filled.add(target.data_ptr())
        copies.setdefault(entry.storage, []).extend(_copies(found, rank, entry, target))
    for storage in sorted(copies):
        yield from _merged(chunks[storage], sorted(copies[storage], key=lambda copy: copy.begin))


def _copies(found: Plan, rank: int, entry: Tensor, target: torch.Tensor) -> list[_Copy]:
    dim = found.divisions[entry.name].dim
    if dim is None:
        return [_Copy(entry, (), target)] if rank == found.whole_from else []
    copies = []
    for piece in found.taken[entry.name]:
        if piece.rank == rank and piece.length:
            into = target.narrow(dim, piece.at, piece.length)
            copies += _cut(entry, (dim, piece.start, piece.length), into)
    return copies


def _cut(entry: Tensor, piece: tuple[int, int, int], into: torch.Tensor) -> list[_Copy]:
    """Pieces of a tensor that is divided by another dimension than the first lie all over it: some rows at a time."""
    rows = entry.shape[0]
    step = max(1, rows * BATCH // max(1, entry.extent)) if piece[0] else rows
    if step >= rows:
        return [_Copy(entry, (piece,), into)]
    return [
        _Copy(entry, (piece, (0, row, min(step, rows - row))), into.narrow(0, row, min(step, rows - row)))
        for row in range(0, rows, step)
    ]


def _merged(chunks: Sequence[Chunk], copies: Sequence[_Copy]) -> Iterator[_Window]:
    """No chunk is read twice, but where a window would become too large."""
    last: _Window | None = None
    for copy in copies:
        own = tuple(chunk for chunk in chunks if chunk.at < copy.end and copy.begin < chunk.at + chunk.length)
        if last is not None and own[0].at <= last.chunks[-1].at and last.bytes < BATCH:
            new = tuple(chunk for chunk in own if chunk.at > last.chunks[-1].at)
            last = _Window(last.chunks + new, (*last.copies, copy))
            continue
        if last is not None:
            yield last
        last = _Window(own, (copy,))
    if last is not None:
        yield last


def _read(
    one: Opened, windows: Sequence[_Window], options: RestoreOptions, kept: KeptHelpers | None
) -> list[RestoreReport]:
    reports: list[RestoreReport] = []
    done = 0
    with contextlib.ExitStack() as stack:
        way: Reading | None = None
        for batch in _batches(windows):
            memory = {
                str(number): torch.empty(window.bytes, dtype=torch.uint8, device=window.device)
                for number, window in enumerate(batch)
            }
            if way is None:
                way = stack.enter_context(reading(one.source, memory.values(), options, kept))
            reports.append(
                restore(one.source, _part(one.snapshot, batch), memory, (), _after(options, done, None), way)
            )
            done += reports[-1].stored
            with torch.no_grad():
                for number, window in enumerate(batch):
                    for copy in window.copies:
                        copy.into.copy_(copy.seen(memory[str(number)], window.begin))
    return reports


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in windows:
        full = sum(each.bytes for each in batch) + window.bytes > BATCH
        if batch and (full or batch[0].device != window.device):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _part(snapshot: Snapshot, windows: Sequence[_Window]) -> Snapshot:
    """The same file, as if it held nothing but these windows, each a tensor of bytes."""
    chunks = [
        dataclasses.replace(chunk, storage=number, at=chunk.at - window.begin)
        for number, window in enumerate(windows)
        for chunk in window.chunks
    ]
    tensors = [
        Tensor(str(number), TENSOR, "uint8", (window.bytes,), (1,), number) for number, window in enumerate(windows)
    ]
    index = Index(tuple(tensors), tuple(window.bytes for window in windows))
    return dataclasses.replace(snapshot, index=index, chunks=tuple(chunks))


def _after(options: RestoreOptions, before: int, whole: int | None) -> RestoreOptions:
    """The same, with progress that goes on from what was done before."""
    progress = options.progress
    if progress is None:
        return options
    tell = progress

    def onward(done: int, total: int) -> None:
        tell(before + done, total if whole is None else whole)

    return dataclasses.replace(options, progress=onward)


def _summary(
    reports: Sequence[RestoreReport], opened: Mapping[int, Opened], tensors: int, seconds: float
) -> RestoreReport:
    verified, route, why = "none", "nothing is read", "this rank's share is padding"
    if reports:
        verified, route, why = reports[0].verified, reports[0].route, reports[0].why
    sources: dict[str, int] = {}
    phases: dict[str, float] = {}
    for report in reports:
        for name, size in report.sources.items():
            sources[name] = sources.get(name, 0) + size
        for name, took in report.seconds.items():
            phases[name] = phases.get(name, 0.0) + took
    names: list[Source] = [one.source for one in opened.values()]
    return RestoreReport(
        ", ".join(source.name for source in names),
        sum(report.bytes for report in reports),
        tensors,
        verified,
        phases | {"total": seconds},
        any(report.replaced for report in reports),
        route,
        f"{why}; {len(names)} of the files of another number of ranks",
        sources,
        sum(report.stored for report in reports),
    )
