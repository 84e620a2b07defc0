"""The workers' part: pages of blocks into a store's files, and out of them; called through collective_rpc."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ....errors import CorruptionError, DeviceError, MismatchError
from ....format.identity import require
from ....format.kv import Region, require_layout
from ....sessions import blocks
from ....sessions.blocks import Name
from ....sessions.context import Context
from ....sessions.store import Store
from ....transport import cuda, parallel
from ....transport.collector import collection_paused
from ....transport.files import Files
from ....transport.links import Place, by_driver, link_to
from ....transport.medium import in_memory
from ....transport.pipeline import Range, deliver
from ....transport.wordsum_cuda import CudaSums
from ....weights import ahead
from ....weights.layout import byte_view, host_bytes
from ....weights.reading import RestoreOptions, reading
from ....weights.waterfall import Phases
from ..answers import answering
from ..kv.pages import identity, room_on, whole_layout
from ..kv.regions import gather, regions, rows, scatter, scratch

_AT_ONCE = 64 << 20
"""Bytes of blocks that are on their way at once."""

Regions = list[tuple[Region, torch.Tensor]]
Wanted = list[tuple[Name, int]]
"""Blocks of a store, and where each goes in the pool."""


@answering
@torch.inference_mode()
def write(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's blocks that a store lacks.

    Args:
        options: ``store``; ``blocks`` of the pool; ``layout`` without regions; ``model``; ``tokens`` of whole blocks
            and ``salt``; ``pages``: number and group of each block, and ``ids``, where the engine has it.

    Returns:
        ``context``: its document; ``added`` files, ``bytes`` written, ``phases``.
    """
    phases = Phases()
    found = regions(worker, options["blocks"])
    context = Context(
        dataclasses.replace(identity(worker), model=options["model"]), whole_layout(options["layout"], found)
    )
    directory = Store(options["store"]).blocks
    names = _names(context, options)
    wanted = [(name, id_) for name, id_ in zip(names, options["ids"], strict=True) if not name.path(directory).exists()]
    phases.end("open")
    added = 0
    host: torch.Tensor | None = None
    for part in _parts(wanted, context.page):
        if host is None and by_driver(found[0][1].device):
            host = _host_room(len(part), context.page, pinned=True)
        payloads, sums = _gathered(found, [id_ for _, id_ in part], host)
        phases.end("gather")

        def keep(at: int, part: Any = part, payloads: Any = payloads, sums: Any = sums) -> bool:
            return blocks.write(directory, part[at][0], payloads[at], words=sums[at])

        added += _each(len(part), keep)
        phases.end("write")
    return {"context": context.to_json(), "added": added, "bytes": added * context.page, "phases": phases.seconds}


@answering
@torch.inference_mode()
def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Put a store's blocks into blocks that nobody uses, each verified before it is put there.

    Args:
        options: ``store``; ``contexts``: ids by rank; ``what``, for messages; ``blocks`` of the pool; ``layout``
            without regions; ``model``; ``tokens``, ``salt``, ``pages`` as of ``write``; ``slots`` of those and ``ids``
            of the blocks that they go to.
    """
    phases = Phases()
    own = dataclasses.replace(identity(worker), model=options["model"])
    found = regions(worker, options["blocks"])
    store = Store(options["store"])
    with collection_paused():
        context = store.context(options["contexts"][own.parallel.rank])
        require(context.identity, own, options["what"])
        require_layout(context.layout, whole_layout(options["layout"], found), options["what"])
        names = _names(context, options)
        if len(names) <= max(options["slots"]):
            raise MismatchError(f"{options['what']} has fewer blocks than were asked for")
        wanted = [(names[slot], id_) for slot, id_ in zip(options["slots"], options["ids"], strict=True)]
        phases.end("open")
        bring = _to_device if by_driver(found[0][1].device) else _through_host
        bring(store, found, wanted, context.page, phases)
    return {"bytes": len(wanted) * context.page, "phases": phases.seconds}


def _through_host(store: Store, found: Regions, wanted: Wanted, page: int, phases: Phases) -> None:
    """Read and verified by threads, and copied by torch from there."""
    device = found[0][1].device
    for part in _parts(wanted, page):
        room = _host_room(len(part), page, pinned=device.type == "cuda")
        views = [host_bytes(byte_view(row)) for row in room]

        def read(at: int, part: Any = part, views: Any = views) -> bool:
            blocks.read(store.blocks, part[at][0], views[at], words=False)
            return True

        _each(len(part), read)
        phases.end("read")
        _scattered(found, room.to(device, non_blocking=True), [id_ for _, id_ in part])
        phases.end("scatter")


def _to_device(store: Store, found: Regions, wanted: Wanted, page: int, phases: Phases) -> None:
    """By the same way as a file of KV blocks (``kv.pages``): helpers read, and the GPU verifies."""
    device, directory = found[0][1].device, os.fspath(store.blocks)
    step = max(1, min(len(wanted), room_on(device) // page))
    paths = [f"{directory}/{name.file}" for name, _ in wanted]
    with contextlib.ExitStack() as stack:
        try:
            memory = stack.enter_context(scratch(step * page, device))
        except DeviceError:  # not even for one block
            _through_host(store, found, wanted, page, phases)
            return
        files = stack.enter_context(contextlib.closing(Files(paths, blocks.PAYLOAD_AT + page, directory)))
        way = stack.enter_context(reading(files, [memory], RestoreOptions(), ahead.kept(device)))
        sums = way.sums(device)
        at_hand = _in_memory(directory)
        phases.end("room")
        for first in range(0, len(wanted), step):
            part = wanted[first : first + step]
            begins = range(first * files.stride + blocks.PAYLOAD_AT, files.size, files.stride)
            ranges = [Range(at, page, 0, paths[first + n]) for n, at in zip(range(len(part)), begins, strict=False)]
            places = [Place(memory, number * page, page) for number in range(len(part))]

            def admit(number: int, part: Wanted = part, ranges: list[Range] = ranges) -> bool:
                words = blocks.check(store.blocks, part[number][0], page).wordsum
                ranges[number] = ranges[number]._replace(wordsum=words)
                return True

            options: dict[str, Any] = {"workers": parallel.default_workers(), "helpers": way.helpers}
            if at_hand:
                options["admit"] = admit
            else:  # many at once: a disk may take its time for each
                _each(len(part), admit)
            with contextlib.closing(link_to(places, sums)) as link:
                deliver(way.reader, directory, ranges, link, damage=_damaged, **options)
            phases.end("read")
            _scattered(found, memory[: len(part) * page].view(len(part), page), [id_ for _, id_ in part])
            phases.end("scatter")
    phases.end("close")


def _in_memory(directory: str) -> bool:
    """Whether files of a directory are memory already; also where there is none, which others find out."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return in_memory(descriptor)
    finally:
        os.close(descriptor)


def _damaged(_: str, block: Range) -> CorruptionError:
    return blocks.damaged(repr(block.label))


def _names(context: Context, options: dict[str, Any]) -> list[Name]:
    count = len(options["tokens"]) // context.layout.block_size
    addresses = [*context.addresses(options["tokens"], options["salt"], count)]
    return [Name(addresses[number], group) for number, group in options["pages"]]


def _parts(items: Wanted, page: int) -> Iterator[Wanted]:
    step = max(1, _AT_ONCE // page)
    for first in range(0, len(items), step):
        yield items[first : first + step]


def _host_room(count: int, page: int, *, pinned: bool) -> torch.Tensor:
    """Memory for so many blocks; page-locked if that is wanted, and allowed here."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty((count, page), dtype=torch.uint8, pin_memory=True)
    return torch.empty((count, page), dtype=torch.uint8)


def _gathered(found: Regions, ids: list[int], host: torch.Tensor | None) -> tuple[list[memoryview], list[int | None]]:
    """The bytes of blocks, each one's page of every region, one after another; and their word sums.

    Args:
        host: rows for as many blocks, where an NVIDIA GPU has them, which computes the sums; None: they stay unknown.
    """
    device = found[0][1].device
    room = torch.empty((len(ids), sum(region.page for region, _ in found)), dtype=torch.uint8, device=device)
    numbers, at = rows(ids, device), 0
    for region, view in found:
        part = torch.empty((len(ids), region.page), dtype=torch.uint8, device=device)
        gather(view, numbers, part)
        room[:, at : at + region.page] = part
        at += region.page
    sums: list[int | None] = [None] * len(ids)
    if host is not None:
        sums = [*_sums(room)]
        room = host[: len(ids)].copy_(room)
    return [host_bytes(byte_view(row)) for row in room.cpu()], sums


def _sums(room: torch.Tensor) -> list[int]:
    """Of each row, on its GPU: a processor takes longer for them than for writing the bytes."""
    device, page = room.device, room.shape[1]
    torch.cuda.current_stream(device).synchronize()
    kernel = ahead.kept(device).kernels.sums(device.index or 0)
    with (
        contextlib.closing(cuda.Context(device.index or 0)) as context,
        context.entered(),
        CudaSums(context, len(room), kernel) as sums,
    ):
        sums.add([(room.data_ptr() + number * page, page) for number in range(len(room))])
        return sums.results()


def _scattered(found: Regions, there: torch.Tensor, ids: list[int]) -> None:
    """The other way, of bytes on the regions' device."""
    device = there.device
    into, at = rows(ids, device), 0
    for region, view in found:
        step = max(1, _AT_ONCE // region.page)  # torch's allocator keeps what was asked of it
        for first in range(0, len(ids), step):
            part = there[first : first + step, at : at + region.page]
            if (at | there.shape[1]) % view.element_size():  # words of this region lie across those of the rows
                part = part.contiguous()
            scatter(view, part, None, into[first : first + step])
        at += region.page
    if device.type == "cuda":  # before the next part takes its place
        torch.cuda.current_stream(device).synchronize()


def _each(count: int, work: Callable[[int], bool]) -> int:
    """How many of ``work(0)`` to ``work(count - 1)`` said yes, many at once."""
    numbers, done = parallel.Shared(range(count)), []

    def body(stop: threading.Event) -> None:
        for number in numbers:
            if stop.is_set():
                return
            done.append(work(number))

    parallel.crew(body, min(max(1, count), parallel.default_workers()))
    return sum(done)
