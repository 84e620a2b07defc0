"""The workers' part: pages of blocks, gathered from the KV cache and scattered into it; called through collective_rpc.

Arguments and results are plain values, failures among them (answers.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ....errors import CorruptionError, DeviceError, MismatchError, ReplacedError, UnsupportedError
from ....format.header import Header
from ....format.identity import Identity, require
from ....format.index import Index, Tensor
from ....format.kv import PAGES, Layout, Region, require_layout
from ....kv.read import count_slots, freeze_of
from ....transport.collector import collection_paused
from ....transport.links import by_driver
from ....transport.reading_helpers import WORTH_RUNNING
from ....weights import ahead
from ....weights.capture import Captured, Named, Storage, StorageBytes, capture
from ....weights.freeze import FreezeOptions
from ....weights.layout import byte_view, host_bytes
from ....weights.open import Opened, open_rank
from ....weights.ranks import Exchange, alone, freeze_rank
from ....weights.reading import RestoreOptions, reading
from ....weights.restore import restore
from ....weights.waterfall import Phases
from ..answers import answering
from ..exchange import world_exchange
from ..identity import engine_identity
from . import lent
from .regions import gather, page_of, regions, rows, scatter, scratch

_SHARE, _MOST = 0.25, 2 << 30
"""Share of a GPU's free memory, and bytes of it, that pages on their way may take."""
_NICE = 19
"""Priority of a freeze beside an engine that computes on the same cores: the lowest that still gets its turn."""
_BESIDE_STEPS = 2
"""Threads of a freeze from a GPU beside requests."""
_ALIGNED = 256
"""Bytes that a part of memory on the way is a multiple of."""
_ON_HOST = 256 << 20
"""The same of the host's memory, where the KV cache is there, or a GPU has no room."""


@answering
@torch.inference_mode()
def describe(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """This rank's identity, once its regions are known to be of known layouts.

    Args:
        options: ``blocks`` of the pool; ``moved``: bytes of a restore that this begins, or None.
    """
    device: torch.device | None = getattr(worker, "_thaw_kv_device", None)
    if device is None or options["moved"] is None:  # once is enough for a restore: ``fill`` looks again
        device = worker._thaw_kv_device = regions(worker, options["blocks"])[0][1].device
    if (options["moved"] or 0) >= WORTH_RUNNING and by_driver(device):
        ahead.kept(device).start(device.index or 0)  # while the core reads what there is
    return {"identity": identity(worker).to_json()}


@answering
def expect(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Make ready what ``fill`` will need.

    Args:
        options: ``blocks`` of the pool.
    """
    ahead.expect(regions(worker, options["blocks"])[0][1].device)
    return {}


@answering
@torch.inference_mode()
def freeze(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's pages, rank 0 the table of blocks too.

    Args:
        options: ``path``, ``force``; ``blocks`` of the pool; ``ids`` of the blocks by slot; ``layout`` without regions;
            ``model``: the model id; ``table``: name to dtype, shape and bytes; ``writer``; ``job``: the id under which
            a thread should do it while the engine goes on, where this is the only rank; ``busy``: whether it has
            requests.

    Returns:
        The FreezeReport as a dict, or ``{"running": True}``, and then ``job`` has it.
    """
    own, found = identity(worker), regions(worker, options["blocks"])
    header = Header(identity=own, writer=options["writer"], kv=whole_layout(options["layout"], found))
    exchange = world_exchange()
    if options["job"] is None or exchange is not alone:  # ranks in threads would mix their messages with the engine's
        return _write(options, header, found, exchange, None)
    event = None
    if found[0][1].device.type == "cuda":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(found[0][1].device))  # the pages are whole after this
    results = _jobs[options["job"]] = queue.SimpleQueue()
    writing = answering(torch.inference_mode()(_write))
    thread = threading.Thread(
        target=lambda: results.put(writing(options, header, found, exchange, event)), name="thaw-kv", daemon=True
    )
    thread.start()
    return {"running": True}


_jobs: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
"""Of this worker process: where the answer of each freeze in the background will be."""


@answering
@torch.inference_mode()
def job(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``freeze`` gives of a job, once; ``{"running": True}`` before."""
    try:
        answer = _jobs[options["job"]].get_nowait()
    except queue.Empty:
        return {"running": True}
    del _jobs[options["job"]]
    return answer


def _write(
    options: dict[str, Any],
    header: Header,
    found: list[tuple[Region, torch.Tensor]],
    exchange: Exchange,
    event: torch.cuda.Event | None,
) -> dict[str, Any]:
    phases, named = Phases(), list[Named]()
    device = found[0][1].device
    if options["job"] is not None and device.type == "cpu":  # this thread, and those that it starts
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    if header.identity.parallel.rank == 0:
        for name, (dtype, shape, data) in options["table"].items():
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            named.append((name, "tensor", whole.view(getattr(torch, dtype)).view(shape)))
    ids = options["ids"]
    with _beside(event, device) as stream, _gathered(found, ids) as gathered:
        phases.end("gather")
        table = capture(named)
        entries, storages, tensors = [*table.index.tensors], [*table.storages], [*table.tensors]
        for region, view in found:
            storage: Storage = _Pages(view, ids, stream)
            if region.name in gathered:
                storage = StorageBytes(gathered[region.name], (region.page, 1))
            entries.append(
                Tensor(PAGES + region.name, "tensor", "uint8", (len(ids), region.page), (region.page, 1), len(storages))
            )
            storages.append(storage)
            tensors.append(view)
        captured = Captured(
            Index(tuple(entries), tuple(s.length for s in storages), ()), tuple(storages), tuple(tensors)
        )
        freezing = FreezeOptions(force=options["force"], workers=_threads(options, device), once=True)
        report = freeze_rank(options["path"], header, captured, freezing, exchange, lambda: options["model"])
    phases.add({name: value for name, value in report.seconds.items() if name != "total"}, "capture")
    return dataclasses.asdict(report) | {"phases": phases.seconds}


def _threads(options: dict[str, Any], device: torch.device) -> int | None:
    """Few beside a running engine; None for what the machine bears.

    On the host the engine keeps the other cores. On a GPU its steps are Python of this very process, which has to win
    the interpreter's lock from every one of them.
    """
    if options["job"] is None:
        return None
    if device.type == "cpu":
        return 1
    return _BESIDE_STEPS if options["busy"] else None


@contextlib.contextmanager
def _beside(event: torch.cuda.Event | None, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """A stream of its own that begins after an event; None where there is none to wait for."""
    if event is None:
        yield None
        return
    torch.cuda.set_device(device)  # of this thread: a new one begins with the first GPU
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        yield stream


@contextlib.contextmanager
def _gathered(found: list[tuple[Region, torch.Tensor]], ids: list[int]) -> Iterator[dict[str, torch.Tensor]]:
    """Pages in a GPU's memory, one after another, by region: as many regions as it has room for."""
    device = found[0][1].device
    if device.type != "cuda":
        yield {}
        return
    with contextlib.ExitStack() as stack:
        gathered = {}
        first = next(_groups(found, len(ids), room_on(device)))
        try:
            memory = stack.enter_context(scratch(_size(first, len(ids)), device))
            parts, numbers = _cut(memory, first, len(ids)), rows(ids, device)
            for region, view in first:
                gather(view, numbers, parts[region.name])
            gathered = parts
        except (DeviceError, torch.OutOfMemoryError):  # less room than the driver said: all go through host memory
            pass
        torch.cuda.current_stream(device).synchronize()  # and what was asked for before is done, whoever reads
        yield gathered


def _groups(
    found: list[tuple[Region, torch.Tensor]], pages: int, room: int
) -> Iterator[list[tuple[Region, torch.Tensor]]]:
    """Regions, as many together as there is room for pages of; none where there is not for one."""
    group: list[tuple[Region, torch.Tensor]] = []
    taken = 0
    for item in found:
        size = _size([item], pages)
        if taken + size > room and group:
            yield group
            group, taken = [], 0
        if size > room:
            yield []
            return
        group.append(item)
        taken += size
    yield group


def _size(group: list[tuple[Region, torch.Tensor]], pages: int) -> int:
    """Bytes for so many pages of each region, each part rounded up to what any word may lie at."""
    return sum(-(-pages * region.page // _ALIGNED) * _ALIGNED for region, _ in group)


def _cut(memory: torch.Tensor, group: list[tuple[Region, torch.Tensor]], pages: int) -> dict[str, torch.Tensor]:
    """A part for the pages of each region, ``(pages, page)``, by its name."""
    parts, at = {}, 0
    for region, view in group:
        parts[region.name] = memory[at : at + pages * region.page].view(pages, region.page)
        at += _size([(region, view)], pages)
    return parts


def room_on(device: torch.device) -> int:
    """Bytes that pages on their way may take in a device's memory now."""
    if device.type != "cuda":
        return _ON_HOST
    return min(int(_SHARE * torch.cuda.mem_get_info(device)[0]), _MOST)


class _Pages:
    """A storage (weights/capture.py) of pages that are gathered when they are read: a chunk of them at a time."""

    def __init__(self, view: torch.Tensor, ids: list[int], stream: torch.cuda.Stream | None) -> None:
        self._view, self._ids, self._stream, self._page = view, ids, stream, page_of(view)
        self.length = len(ids) * self._page

    def read(self, at: int, length: int) -> memoryview:
        """See Storage."""
        first, last = at // self._page, -(-(at + length) // self._page)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            pages = self._view.index_select(0, rows(self._ids[first:last], self._view.device)).cpu()
        return host_bytes(byte_view(pages))[at - first * self._page :][:length]

    def run(self, at: int, length: int) -> None:
        """They do not lie one after another."""
        return None


@answering
@torch.inference_mode()
def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Verify this rank's file while its pages are put into blocks that nobody uses.

    Where the file turns out to be damaged some of those blocks have been written to; nobody may use them.

    Args:
        options: ``path``; ``opened``: as what the core lends rank 0's file, or left out; ``blocks`` of the pool;
            ``slots`` of the file and ``ids`` of the blocks that they go to; ``model``: the model id; ``layout`` without
            regions; ``freeze``: which one the blocks' table is of.
    """
    phases = Phases()
    own = dataclasses.replace(identity(worker), model=options["model"])
    found = regions(worker, options["blocks"])
    wanted = whole_layout(options["layout"], found)
    with collection_paused(), _opened(options, own.parallel.rank) as opened:
        header = opened.snapshot.header
        require(header.identity, own, options["path"])
        if header.kv is None:
            raise MismatchError(f"{options['path']!r} holds weights, not KV blocks")
        require_layout(header.kv, wanted, options["path"])
        if freeze_of(header) != options["freeze"]:
            raise ReplacedError(f"{options['path']!r} was replaced while it was being restored; restore it again")
        held = count_slots(opened)
        if held <= max(options["slots"]):
            raise CorruptionError(
                f"{opened.source.name!r} holds {held} pages, page {max(options['slots'])} is needed; the set is mixed "
                "up, copy all of it again or freeze again"
            )
        phases.end("open")
        _pass(opened, found, held, options["slots"], options["ids"], phases)
    return {"bytes": sum(region.page for region, _ in found) * len(options["ids"]), "phases": phases.seconds}


@contextlib.contextmanager
def _opened(options: dict[str, Any], rank: int) -> Iterator[Opened]:
    """A rank's file: the one that the core has read, where that is in this process, else opened and read here."""
    core = lent.borrowed(options.get("opened", ""))
    if core is not None and rank == 0:
        yield core
        return
    with open_rank(options["path"], rank) as opened:
        yield opened


def _pass(
    opened: Opened,
    found: list[tuple[Region, torch.Tensor]],
    held: int,
    slots: list[int],
    ids: list[int],
    phases: Phases,
) -> None:
    """``held`` pages of each region into memory on the way, a group of regions at a time, and from there to blocks."""
    device = found[0][1].device
    longest, room = max(_size([item], held) for item in found), room_on(device)
    where = device if longest <= room else torch.device("cpu")
    groups = [*_groups(found, held, max(room if where == device else room_on(where), longest))]
    size = max(_size(group, held) for group in groups)
    into = rows(ids, device)
    taken = None if slots == [*range(held)] else rows(slots, where)
    options, kept = RestoreOptions(), ahead.kept(where) if by_driver(where) else None
    with scratch(size, where) as memory, reading(opened.source, [memory], options, kept) as way:
        phases.end("room")
        for group in groups:
            parts = _cut(memory, group, held)
            targets = {PAGES + name: part for name, part in parts.items()}
            done = restore(opened.source, opened.snapshot, targets, targets, options, way, partial=True)
            phases.add({name: done.seconds[name] for name in ("match", "plan", "read", "settle")}, "close")
            for region, view in group:
                scatter(view, parts[region.name], taken, into)
            if device.type == "cuda":  # before the next group takes their place
                torch.cuda.current_stream(device).synchronize()
            phases.end("scatter")
    phases.end("close")


def whole_layout(shared: dict[str, Any], found: list[tuple[Region, torch.Tensor]]) -> Layout:
    """A rank's layout: what the engine core knows of it, as a document, and this rank's regions."""
    held = tuple(region for region, _ in found)
    # One stands for all: they are this process's own, and checking hundreds would hold up a step.
    return dataclasses.replace(Layout.from_json(shared | {"regions": [held[0].to_json()]}), regions=held)


def identity(worker: Any) -> Identity:
    """Of this rank's KV cache, the model id left open.

    Raises:
        UnsupportedError: what makes keys and values depend on more than the identity says.
    """
    known: Identity | None = getattr(worker, "_thaw_kv_identity", None)
    if known is not None:  # it does not change, and reading the configuration's files again would hold up a step
        return known
    config = worker.vllm_config
    draft = getattr(config.speculative_config, "draft_model_config", None)
    if draft is not None and draft is not config.model_config:  # methods without a draft model name the target there
        raise UnsupportedError("KV blocks of engines with a draft model are not supported in this version")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError(
            "KV scales that are computed while running are not stored; use calculate_kv_scales=False"
        )
    if _length_matters(config.model_config.hf_config):
        raise UnsupportedError(
            "this model's rotary embedding depends on max_model_len, which a file does not say; not in this version"
        )
    found = dataclasses.replace(engine_identity(config, config.model_config), stage="kv")
    worker._thaw_kv_identity = found
    return found


def _length_matters(config: Any) -> bool:
    """Whether keys are rotated by the longest length that the engine was started for, not by their position alone."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    held = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    kinds: set[object] = set()
    while held:
        value = held.pop()
        if isinstance(value, dict):
            kinds |= {value.get("rope_type"), value.get("type")}
            held += value.values()
    return bool(kinds & {"longrope", "su", "dynamic"})
