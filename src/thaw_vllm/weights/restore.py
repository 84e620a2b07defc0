"""Filling a module from a snapshot: everything is matched before the first byte is copied."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import MismatchError, UsageError
from ..format.chunks import Chunk
from ..format.index import Tensor
from ..format.snapshot import Snapshot
from ..transport import parallel
from ..transport.read import Piece, read
from ..transport.source import FileSource, Source
from .layout import byte_view, check_storable, dense, dtype_name, extent, host_bytes, integers, ordered, runs, settle


@dataclass(frozen=True)
class RestoreOptions:
    """How a snapshot is read.

    Attributes:
        verify: hold every chunk against its checksum.
        workers: threads; None for what the machine bears.
        progress: called as (bytes done, bytes in all) from any thread.
    """

    verify: bool = True
    workers: int | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, not {self.workers}")


@dataclass(frozen=True)
class RestoreReport:
    """What was thawed and how long it took.

    Attributes:
        path: where from.
        bytes: original bytes read.
        tensors: names filled, ties included.
        verified: ``xxh3`` when every chunk was held against its checksum, else ``none``.
        seconds: by phase (``open``, ``match``, ``read``, ``total``).
        replaced: the path names another file by now; what was read is the earlier one, whole.
    """

    path: str
    bytes: int
    tensors: int
    verified: str
    seconds: dict[str, float] = field(default_factory=dict)
    replaced: bool = False

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes a second, everything counted."""
        return self.bytes / 1e9 / max(self.seconds["total"], 1e-9)


def restore(
    source: Source,
    snapshot: Snapshot,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
) -> RestoreReport:
    """Fill ``targets`` in place.

    Args:
        source: the file; stays the caller's.
        snapshot: its checked sections, chunk table included.
        targets: every tensor that may be filled, by name; ties under each of their names.
        required: names that the snapshot must hold. Names it holds beyond ``targets`` are refused.
        options: how to read.

    Raises:
        MismatchError: missing or extra names, another shape, dtype, stride of a repeated dimension or tie; nothing
            was copied.
        CorruptionError, StorageError, ReplacedError: part of the bytes may have been copied; do not use the tensors.
    """
    start = time.perf_counter()
    if snapshot.preamble.chunks != len(snapshot.chunks):
        raise UsageError(f"{source.name!r} was opened without its chunk table; open it with_chunks=True to thaw it")
    match(snapshot, targets, required, source.name)
    matched = time.perf_counter()
    files = sum(snapshot.index.storages[f.storage] for f in snapshot.index.files if f.storage is not None)
    total = snapshot.bytes - files
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if options.progress is not None:
                options.progress(done, total)

    pieces = list(_pieces(snapshot, targets))
    settle(targets.values())
    with torch.no_grad():
        read(
            source,
            pieces,
            workers=options.workers or parallel.default_workers(),
            verify=options.verify,
            progress=advance,
        )
    settle(targets.values())
    source.check_unchanged()
    end = time.perf_counter()
    return RestoreReport(
        source.name,
        total,
        len(snapshot.index.tensors),
        "xxh3" if options.verify else "none",
        {"match": matched - start, "read": end - matched, "total": end - start},
        isinstance(source, FileSource) and source.replaced,
    )


def match(snapshot: Snapshot, targets: Mapping[str, torch.Tensor], required: Collection[str], name: str) -> None:
    """Hold names, shapes, dtypes and ties against each other.

    Raises:
        MismatchError: what differs, by name.
    """
    held = {t.name for t in snapshot.index.tensors}
    missing = sorted(set(required) - held)
    extra = sorted(held - set(targets))
    if missing or extra:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"holds {_listed(extra)}, which the model does not have"] if extra else []
        raise MismatchError(f"{name!r} {' and '.join(parts)}; thaw it into the model it was frozen from")
    owners: dict[int, Tensor] = {}
    spans: list[tuple[str, int, int, str]] = []
    for entry in snapshot.index.tensors:
        target = targets[entry.name]
        check_storable(entry.name, target)
        if tuple(target.shape) != entry.shape or dtype_name(target.dtype) != entry.dtype:
            raise MismatchError(
                f"{name!r} holds {entry.name!r} as {entry.dtype} {list(entry.shape)}, the model has it as "
                f"{dtype_name(target.dtype)} {list(target.shape)}; thaw it into the model it was frozen from"
            )
        if entry.storage is None:
            continue
        _match_repeats(entry, target, name)
        owner = owners.setdefault(entry.storage, entry)
        if owner is entry:
            low, high = extent(target)
            spans.append((str(target.device), low, high, entry.name))
        else:
            _match_tie(owner, entry, targets, name)
    spans.sort()
    for (device, _, high, first), (other, low, _, second) in itertools.pairwise(spans):
        if device == other and low < high:
            raise MismatchError(
                f"the model ties {first!r} to {second!r}, {name!r} holds them apart; thaw it into the model it was "
                "frozen from"
            )


def _match_repeats(entry: Tensor, target: torch.Tensor, name: str) -> None:
    for size, step, want in zip(entry.shape, entry.stride, target.stride(), strict=True):
        if size > 1 and (step == 0) != (want == 0):
            raise MismatchError(
                f"{name!r} holds {entry.name!r} with strides {list(entry.stride)}, the model has it with "
                f"{list(target.stride())}: one of them repeats elements"
            )


def _match_tie(owner: Tensor, entry: Tensor, targets: Mapping[str, torch.Tensor], name: str) -> None:
    first, second = targets[owner.name], targets[entry.name]
    same_view = (first.data_ptr(), first.stride(), first.device) == (second.data_ptr(), second.stride(), second.device)
    if (entry.offset, entry.shape, entry.stride, entry.dtype) == (owner.offset, owner.shape, owner.stride, owner.dtype):
        tied = same_view
    else:
        tied = (
            first.device == second.device
            and second.data_ptr() - first.data_ptr() == entry.offset
            and _same_strides(first.stride(), owner)
            and _same_strides(second.stride(), entry)
        )
    if not tied:
        raise MismatchError(
            f"{name!r} ties {entry.name!r} to {owner.name!r} in one storage, the model holds them apart; tie them "
            "(for transformers: model.tie_weights()) before thawing"
        )


def _same_strides(stride: tuple[int, ...], entry: Tensor) -> bool:
    return all(a == b for a, b, size in zip(stride, entry.stride, entry.shape, strict=True) if size > 1)


def _pieces(snapshot: Snapshot, targets: Mapping[str, torch.Tensor]) -> Iterator[Piece]:
    owners: dict[int, Tensor] = {}
    for entry in snapshot.index.tensors:
        if entry.storage is not None:
            owners.setdefault(entry.storage, entry)
    base = snapshot.preamble.payload_at
    views: dict[int, tuple[torch.Tensor, memoryview | None] | None] = {}
    for chunk in snapshot.chunks:
        owner = owners.get(chunk.storage)
        if owner is None:  # a carried file
            continue
        target = targets[owner.name]
        if chunk.storage not in views:
            views[chunk.storage] = _direct(owner, target)
        direct = views[chunk.storage]
        label = f"{owner.name!r}"
        into, deliver = None, None
        if direct is None:
            deliver = _scatter(owner, target, chunk)
        elif direct[1] is not None:
            into = direct[1][chunk.at : chunk.at + chunk.length]
        else:
            deliver = _copy(direct[0][chunk.at : chunk.at + chunk.length])
        yield Piece(base + chunk.stored_at, chunk.length, chunk.xxh3, label, into, deliver)


def _direct(entry: Tensor, target: torch.Tensor) -> tuple[torch.Tensor, memoryview | None] | None:
    """The target's bytes when they lie as the storage's do, with their host memory if it is on the host."""
    if not (dense(target) and _same_strides(target.stride(), entry)):
        return None
    view = byte_view(target.detach())
    return view, host_bytes(view) if view.device.type == "cpu" else None


def _copy(view: torch.Tensor) -> Callable[[memoryview], None]:
    def deliver(data: memoryview) -> None:
        with torch.inference_mode():  # holds for one thread, and tensors made under it can be written under it only
            view.copy_(torch.frombuffer(data, dtype=torch.uint8))

    return deliver


def _scatter(entry: Tensor, target: torch.Tensor, chunk: Chunk) -> Callable[[memoryview], None]:
    """Element by element into a target whose strides differ from the storage's."""
    seen = ordered(integers(target), entry.stride)
    item = target.element_size()

    def deliver(data: memoryview) -> None:
        with torch.inference_mode():  # as in _copy
            elements = torch.empty(chunk.length // item, dtype=seen.dtype, device="cpu")
            host_bytes(byte_view(elements))[:] = data
            position = 0
            for part in runs(seen, chunk.at // item, (chunk.at + chunk.length) // item):
                part.copy_(elements[position : position + part.numel()].view(part.shape))
                position += part.numel()

    return deliver


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def filled(snapshot: Snapshot, source: Source, storage: int) -> bytes:
    """The verified original bytes of one storage, for carried files.

    Raises:
        CorruptionError: a checksum does not agree.
    """
    data = bytearray(snapshot.index.storages[storage])
    view = memoryview(data)
    base = snapshot.preamble.payload_at
    read(
        source,
        [
            Piece(base + c.stored_at, c.length, c.xxh3, f"storage {storage}", view[c.at : c.at + c.length])
            for c in snapshot.chunks
            if c.storage == storage
        ],
        workers=1,
    )
    return bytes(data)
