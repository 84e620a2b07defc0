"""Filling a module from a snapshot: everything is matched before the first byte is copied."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..codecs import quick
from ..errors import CorruptionError, MismatchError, UsageError
from ..format.chunks import RAW, Chunk
from ..format.index import Tensor
from ..format.snapshot import Snapshot
from ..transport import parallel
from ..transport.borrowed_gpu import BorrowedGpu
from ..transport.checksum import damaged
from ..transport.coded_link import CodedLink
from ..transport.coded_torch import CodedTorchLink
from ..transport.files import place
from ..transport.links import CudaLink, Link, Place, by_driver, link_to, runs_of
from ..transport.pipeline import Range, deliver
from ..transport.read import Piece, piece_of, read
from ..transport.readers import Through
from ..transport.resident import Resident
from ..transport.source import FileSource, Source
from .layout import byte_view, check_storable, dense, dtype_name, extent, host_bytes, integers, ordered, runs, settle
from .reading import Reading, RestoreOptions, reading
from .waterfall import waterfall


@dataclass(frozen=True)
class RestoreReport:
    """What was thawed and how long it took.

    Attributes:
        path: where from.
        bytes: original bytes read.
        tensors: names filled, ties included.
        verified: by which checksum every chunk was verified: ``xxh3`` (on the host), ``wordsum`` (on the device),
            ``xxh3+wordsum`` (each its part), or ``none``.
        seconds: by phase, in order (``choose``, ``open``, ``match``, ``plan``, ``read``, ``settle``; before them
            ``borrow`` where another process had the weights), and ``total``.
        replaced: the path names another file by now; what was read is the earlier one, whole.
        route: how the bytes moved.
        why: why that way.
        sources: bytes by where they came from (``cached``, ``direct``), where that was told apart.
        stored: bytes that moved: fewer than ``bytes`` where the snapshot is compressed; 0 where nothing was read.
    """

    path: str
    bytes: int
    tensors: int
    verified: str
    seconds: dict[str, float] = field(default_factory=dict)
    replaced: bool = False
    route: str = ""
    why: str = ""
    sources: dict[str, int] = field(default_factory=dict)
    stored: int = 0

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes of original bytes a second, everything counted."""
        return self.bytes / 1e9 / max(self.seconds["total"], 1e-9)

    @property
    def wire_gb_per_s(self) -> float:
        """The same of the bytes that moved."""
        return self.stored / 1e9 / max(self.seconds["total"], 1e-9)

    def waterfall(self) -> str:
        """The phases as lines of text with bars."""
        return waterfall(self.seconds)


def restore(
    source: Source,
    snapshot: Snapshot,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    way: Reading | None = None,
    *,
    partial: bool = False,
    landed: Callable[[int], None] | None = None,
) -> RestoreReport:
    """Fill ``targets`` in place.

    Args:
        source: the file; stays the caller's. Of another process's memory on a GPU the copies were asked for.
        snapshot: its checked sections, chunk table included.
        targets: every tensor that may be filled, by name; ties under each of their names.
        required: names that the snapshot must hold.
        options: how to read.
        way: of this source, for tensors on these devices; None to choose now.
        partial: leave out what the snapshot holds beyond ``targets``, which else is refused; not with ties.
        landed: called with the offset in the source of each chunk that is in its tensor, from any thread; on a GPU
            its check may still be under way.

    Raises:
        MismatchError: missing or extra names, another shape, dtype, stride of a repeated dimension or tie; nothing
            was copied.
        CorruptionError, StorageError, ReplacedError: part of the bytes may have been copied; do not use the tensors.
    """
    if way is None:
        with reading(source, targets.values(), options) as way:
            return restore(source, snapshot, targets, required, options, way, partial=partial, landed=landed)
    start = time.perf_counter()
    require_chunks(snapshot, source.name)
    entries = [entry for entry in snapshot.index.tensors if not partial or entry.name in targets]
    storages = {entry.storage for entry in entries if entry.storage is not None}
    total = sum(snapshot.index.storages[storage] for storage in storages)
    stored = sum(chunk.stored for chunk in snapshot.chunks if chunk.storage in storages)
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if options.progress is not None:
                options.progress(done, stored)

    match(snapshot, targets, required, source.name, partial=partial)
    matched = time.perf_counter()
    work = sort(snapshot, targets)
    workers = options.workers or parallel.default_workers()
    planned = time.perf_counter()
    if not isinstance(source, BorrowedGpu):  # its copies are under way
        settle(targets.values())
    names = []
    if work.host:
        through = Through(source, way.reader) if way.reader.margin else source
        with torch.no_grad():
            read(through, work.host, workers=workers, verify=options.verify, progress=advance, landed=landed)
        names.append("into host memory")
    for ranges, places in work.devices.values():
        straight = landed is not None and not isinstance(source, Resident | BorrowedGpu)
        early = landed if straight and not any(found.coded for found in ranges) else None
        names.append(_to_device(source, way, ranges, places, workers, options.verify, advance, early))
        if landed is not None and early is None:  # decoded by now, too
            for found in ranges:
                landed(found.offset)
    arrived = time.perf_counter()
    settle(targets.values())
    source.check_unchanged()
    end = time.perf_counter()
    checks = (["xxh3"] if work.host else []) + (["wordsum"] if work.devices else [])
    return RestoreReport(
        source.name,
        total,
        len(entries),
        "+".join(checks or ["xxh3"]) if options.verify else "none",
        {
            "choose": way.seconds,
            "match": matched - start,
            "plan": planned - matched,
            "read": arrived - planned,
            "settle": end - arrived,
            "total": way.seconds + end - start,
        },
        isinstance(source, FileSource) and source.replaced,
        " → ".join([way.reader.route, *names]),
        way.reader.why,
        way.reader.summary(),
        stored,
    )


def _to_device(
    source: Source,
    way: Reading,
    ranges: list[Range],
    places: list[Place],
    workers: int,
    verify: bool,
    progress: Callable[[int], None],
    landed: Callable[[int], None] | None,
) -> str:
    """Bring chunks to one device; returns what reports call the way."""
    name, helpers = source.name, way.helpers
    with contextlib.closing(_link(source, way, ranges, places, verify)) as link:
        if isinstance(link, CudaLink) and isinstance(source, Resident) and source.locked is not None:
            if isinstance(link, CodedLink):
                source.send_coded(link, ranges, verify=verify, progress=progress)
            else:
                source.send(link.context, ranges, link.runs, verify=verify, progress=progress)
            return f"page-locked memory to cuda:{link.context.device}"
        if isinstance(link, CudaLink) and isinstance(source, BorrowedGpu):
            source.send(ranges, link.runs, verify=verify, progress=progress)
            return f"another process's memory to cuda:{link.context.device}"
        options: dict[str, Any] = {"workers": workers, "verify": verify, "progress": progress}
        options["damage"] = lambda _, found: _damaged(source, found)
        if landed is not None:
            options["landed"] = lambda number: landed(ranges[number].offset)
        if not deliver(way.reader, name, ranges, link, helpers=helpers, **options) or helpers is None:
            return link.name
        return f"{len(helpers.helpers)} processes → {link.name}"


def _link(source: Source, way: Reading, ranges: list[Range], places: list[Place], verify: bool) -> Link:
    device = places[0].view.device
    if isinstance(source, Resident):
        way = replace(way, kernels=source.kernels)
    sums = way.sums(device) if verify else None
    if not any(found.coded for found in ranges):
        return link_to(places, sums)

    def damage(number: int) -> CorruptionError:
        return _damaged(source, ranges[number])

    stored = [found.length if found.coded else 0 for found in ranges]
    if not by_driver(device):
        return CodedTorchLink(places, device.type, stored, damage)
    decoders = way.kernels.decoders(device.index or 0) if way.kernels is not None else None
    return CodedLink(device.index or 0, runs_of(places), stored, damage, sums, decoders)


def _damaged(source: Source, found: Range) -> CorruptionError:
    name, offset = place(source, found.offset)
    return damaged(name, found.label, offset, found.length)


def require_chunks(snapshot: Snapshot, name: str) -> None:
    """
    Raises:
        UsageError: the chunk table was not read.
    """
    if snapshot.preamble.chunks and not snapshot.chunks:
        raise UsageError(f"{name!r} was opened without its chunk table; open it with_chunks=True to thaw it")


def match(
    snapshot: Snapshot,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    name: str,
    *,
    partial: bool = False,
) -> None:
    """Hold names, shapes, dtypes and ties against each other.

    Args:
        partial: see ``restore``.

    Raises:
        MismatchError: what differs, by name.
    """
    if partial and snapshot.index.ties:
        raise UsageError(f"{name!r} ties tensors to one another; thaw all of it")
    held = {t.name for t in snapshot.index.tensors}
    missing = sorted(set(required) - held)
    extra = [] if partial else sorted(held - set(targets))
    if missing or extra:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"holds {_listed(extra)}, which the model does not have"] if extra else []
        raise MismatchError(f"{name!r} {' and '.join(parts)}; thaw it into the model it was frozen from")
    owners: dict[int, Tensor] = {}
    spans: list[tuple[str, int, int, str]] = []
    for entry in snapshot.index.tensors:
        if partial and entry.name not in targets:
            continue
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
            and same_strides(first.stride(), owner)
            and same_strides(second.stride(), entry)
        )
    if not tied:
        raise MismatchError(
            f"{name!r} ties {entry.name!r} to {owner.name!r} in one storage, the model holds them apart; tie them "
            "(for transformers: model.tie_weights()) before thawing"
        )


def same_strides(stride: tuple[int, ...], entry: Tensor) -> bool:
    """Whether strides put elements in the order in which a snapshot has them."""
    return stride == entry.stride or all(
        a == b for a, b, size in zip(stride, entry.stride, entry.shape, strict=True) if size > 1
    )


@dataclass
class Work:
    """A snapshot's chunks by how they reach their tensors.

    Attributes:
        host: those that go into host memory, or through it into a tensor whose strides differ from the file's.
        devices: by device, those that can be copied straight to where they belong, and their places.
    """

    host: list[Piece] = field(default_factory=list)
    devices: dict[torch.device, tuple[list[Range], list[Place]]] = field(default_factory=dict)


def sort(snapshot: Snapshot, targets: Mapping[str, torch.Tensor]) -> Work:
    """The chunks of every tensor, in order of their place in the file; ``match`` has passed."""
    owners: dict[int, Tensor] = {}
    for entry in snapshot.index.tensors:
        if entry.storage is not None and entry.name in targets:
            owners.setdefault(entry.storage, entry)
    base = snapshot.preamble.payload_at
    found = Work()
    storage, direct, label = -1, None, ""
    # In order already where they are all in one file.
    for chunk in sorted(snapshot.chunks, key=lambda chunk: chunk.stored_at):
        owner = owners.get(chunk.storage)
        if owner is None:  # a carried file, or left out
            continue
        target = targets[owner.name]
        if chunk.storage != storage:
            storage, direct, label = chunk.storage, _direct(owner, target), repr(owner.name)
        if direct is None:
            found.host.append(piece_of(chunk, base, label, None, _scatter(owner, target, chunk)))
        elif direct[1] is not None:
            into = direct[1][chunk.at : chunk.at + chunk.length]
            found.host.append(piece_of(chunk, base, label, into))
        elif chunk.codec != RAW and not by_driver(target.device) and quick():
            copy = _copy(direct[0][chunk.at : chunk.at + chunk.length])
            found.host.append(piece_of(chunk, base, label, None, copy))
        else:
            ranges, places = found.devices.setdefault(target.device, ([], []))
            place = base + chunk.stored_at
            ranges.append(Range(place, chunk.stored, chunk.wordsum, label, chunk.codec != RAW))
            places.append(Place(direct[0], chunk.at, chunk.length))
    return found


def as_it_lies(entry: Tensor, target: torch.Tensor) -> bool:
    """Whether the target's bytes lie as the storage's do."""
    return dense(target) and same_strides(target.stride(), entry)


def _direct(entry: Tensor, target: torch.Tensor) -> tuple[torch.Tensor, memoryview | None] | None:
    """The target's bytes when they lie as the storage's do, with their host memory if it is on the host.

    On a CUDA device the target itself stands for them: its address is all that is needed.
    """
    if not as_it_lies(entry, target):
        return None
    if by_driver(target.device):
        return target, None
    view = byte_view(target.detach())
    return view, host_bytes(view) if view.device.type == "cpu" else None


def _scatter(entry: Tensor, target: torch.Tensor, chunk: Chunk) -> Callable[[memoryview], None]:
    """Element by element into a target whose strides differ from the storage's."""
    seen = ordered(integers(target), entry.stride)
    item = target.element_size()

    def deliver(data: memoryview) -> None:
        with torch.inference_mode():  # holds for one thread; tensors made under it can be written under it only
            elements = torch.empty(chunk.length // item, dtype=seen.dtype, device="cpu")
            host_bytes(byte_view(elements))[:] = data
            position = 0
            for part in runs(seen, chunk.at // item, (chunk.at + chunk.length) // item):
                part.copy_(elements[position : position + part.numel()].view(part.shape))
                position += part.numel()

    return deliver


def _copy(view: torch.Tensor) -> Callable[[memoryview], None]:
    """As it lies, to a device that NVIDIA's driver does not know: processors with numba decode faster than torch."""

    def deliver(data: memoryview) -> None:
        with torch.inference_mode():  # see _scatter
            view.copy_(torch.frombuffer(data, dtype=torch.uint8))

    return deliver


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
