"""The workers' part: pages of blocks into a store's files, and out of them; called through collective_rpc."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ....errors import MismatchError
from ....format.identity import require
from ....format.kv import Region, require_layout
from ....sessions import blocks
from ....sessions.blocks import Name
from ....sessions.context import Context
from ....sessions.store import Store
from ....transport import parallel
from ....transport.collector import collection_paused
from ....weights.layout import byte_view, host_bytes
from ....weights.waterfall import Phases
from ..answers import answering
from ..kv.pages import identity, whole_layout
from ..kv.regions import gather, regions, rows, scatter

_AT_ONCE = 64 << 20
"""Bytes of blocks that are on their way at once."""

Regions = list[tuple[Region, torch.Tensor]]


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
    for part in _parts(wanted, context.page):
        payloads = _gathered(found, [id_ for _, id_ in part])
        phases.end("gather")

        def keep(at: int, part: Any = part, payloads: Any = payloads) -> bool:
            return blocks.write(directory, part[at][0], payloads[at])

        added += _each(len(part), keep)
        phases.end("write")
    return {"context": context.to_json(), "added": added, "bytes": added * context.page, "phases": phases.seconds}


@answering
@torch.inference_mode()
def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Put a store's blocks into blocks that nobody uses, each verified before it is copied.

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
        for part in _parts(wanted, context.page):
            room = torch.empty((len(part), context.page), dtype=torch.uint8, pin_memory=found[0][1].is_cuda)
            views = [host_bytes(byte_view(row)) for row in room]

            def read(at: int, part: Any = part, views: Any = views) -> bool:
                blocks.read(store.blocks, part[at][0], views[at])
                return True

            _each(len(part), read)
            phases.end("read")
            _scattered(found, room, [id_ for _, id_ in part])
            phases.end("scatter")
    return {"bytes": len(wanted) * context.page, "phases": phases.seconds}


def _names(context: Context, options: dict[str, Any]) -> list[Name]:
    count = len(options["tokens"]) // context.layout.block_size
    addresses = [*context.addresses(options["tokens"], options["salt"], count)]
    return [Name(addresses[number], group) for number, group in options["pages"]]


def _parts(items: list[tuple[Name, int]], page: int) -> Iterator[list[tuple[Name, int]]]:
    step = max(1, _AT_ONCE // page)
    for first in range(0, len(items), step):
        yield items[first : first + step]


def _gathered(found: Regions, ids: list[int]) -> list[memoryview]:
    """The bytes of blocks: each one's page of every region, one after another."""
    device = found[0][1].device
    room = torch.empty((len(ids), sum(region.page for region, _ in found)), dtype=torch.uint8, device=device)
    numbers, at = rows(ids, device), 0
    for region, view in found:
        part = torch.empty((len(ids), region.page), dtype=torch.uint8, device=device)
        gather(view, numbers, part)
        room[:, at : at + region.page] = part
        at += region.page
    return [host_bytes(byte_view(row)) for row in room.cpu()]


def _scattered(found: Regions, room: torch.Tensor, ids: list[int]) -> None:
    """The other way."""
    device = found[0][1].device
    there, into, at = room.to(device, non_blocking=True), rows(ids, device), 0
    for region, view in found:
        scatter(view, there[:, at : at + region.page].contiguous(), None, into)
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
