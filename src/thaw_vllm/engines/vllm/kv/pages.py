"""The workers' part: pages of blocks, gathered from the KV cache and scattered into it; called through collective_rpc.

Arguments and results are plain values, failures among them (answers.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ....errors import CorruptionError, MismatchError, SpaceError, UnsupportedError
from ....format.header import Header
from ....format.identity import Identity, require
from ....format.index import Index, Tensor
from ....format.kv import PAGES, Layout, Region, require_layout
from ....kv.read import count_slots
from ....transport.collector import collection_paused
from ....weights.capture import Captured, Named, Storage, StorageBytes, capture
from ....weights.freeze import FreezeOptions
from ....weights.layout import dtype_name, host_bytes
from ....weights.open import open_rank
from ....weights.ranks import Exchange, alone, freeze_rank
from ....weights.restore import RestoreOptions, restore
from ....weights.waterfall import Phases
from .. import versions
from ..answers import answering
from ..exchange import world_exchange
from ..identity import engine_identity

_ON_DEVICE = 0.5
"""Share of a GPU's free memory that gathered pages may take; more of them pass through host memory."""
_BESIDE = 1 << 30
"""Most bytes of a GPU's memory that are gathered at once while the engine goes on."""
_IN_MEMORY = 0.5
"""Share of the host's free memory that a file may take while it is thawed."""
_PIECE = 64 << 20
"""Bytes that are scattered at once where they pass through host memory."""


@answering
@torch.inference_mode()
def describe(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """This rank's identity, once its regions are known to be of known layouts."""
    regions(worker, options["blocks"])
    return {"identity": identity(worker).to_json()}


@answering
@torch.inference_mode()
def freeze(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's pages, rank 0 the table of blocks too.

    Args:
        options: ``path``, ``force``; ``blocks`` of the pool; ``ids`` of the blocks by slot; ``layout`` without regions;
            ``model``: the model id; ``table``: name to dtype, shape and bytes; ``writer``; ``job``: the id under which
            a thread should do it while the engine goes on, where this is the only rank.

    Returns:
        The FreezeReport as a dict, or ``{"running": True}``, and then ``job`` has it.
    """
    own, found = identity(worker), regions(worker, options["blocks"])
    header = Header(identity=own, writer=options["writer"], kv=_layout(options["layout"], found))
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
    if header.identity.parallel.rank == 0:
        for name, (dtype, shape, data) in options["table"].items():
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            named.append((name, "tensor", whole.view(getattr(torch, dtype)).view(shape)))
    ids = options["ids"]
    device = found[0][1].device
    with _beside(event, device) as stream:
        gathered = _gathered(found, ids, _BESIDE if options["job"] is not None else None)
        if stream is not None:
            stream.synchronize()
        phases.end("gather")
        table = capture(named)
        entries, storages, tensors = [*table.index.tensors], [*table.storages], [*table.tensors]
        for region, view in found:
            storage: Storage = _Pages(view, ids, stream)
            if region.name in gathered:
                storage = StorageBytes(gathered[region.name].view(torch.uint8), (region.page, 1))
            entries.append(
                Tensor(PAGES + region.name, "tensor", "uint8", (len(ids), region.page), (region.page, 1), len(storages))
            )
            storages.append(storage)
            tensors.append(view)
        captured = Captured(
            Index(tuple(entries), tuple(s.length for s in storages), ()), tuple(storages), tuple(tensors)
        )
        # Beside a running engine on the host: one thread, so that the engine keeps the other cores.
        workers = 1 if options["job"] is not None and device.type == "cpu" else None
        freezing = FreezeOptions(force=options["force"], workers=workers)
        report = freeze_rank(options["path"], header, captured, freezing, exchange, lambda: options["model"])
    phases.add({name: value for name, value in report.seconds.items() if name != "total"}, "capture")
    return dataclasses.asdict(report) | {"phases": phases.seconds}


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


def _gathered(found: list[tuple[Region, torch.Tensor]], ids: list[int], most: int | None) -> dict[str, torch.Tensor]:
    """Pages in a GPU's memory, one after another, by region: as many as a share of what is free now holds."""
    if found[0][1].device.type != "cuda":
        return {}
    room = int(_ON_DEVICE * torch.cuda.mem_get_info(found[0][1].device)[0])
    room = room if most is None else min(room // 4, most)
    gathered = {}
    for region, view in found:
        size = len(ids) * region.page
        if size > room:
            break
        try:
            gathered[region.name] = view.index_select(0, _rows(view, ids))
        except torch.OutOfMemoryError:
            break
        room -= size
    return gathered


class _Pages:
    """A storage (weights/capture.py) of pages that are gathered when they are read: a chunk of them at a time."""

    def __init__(self, view: torch.Tensor, ids: list[int], stream: torch.cuda.Stream | None) -> None:
        self._view, self._ids, self._stream = view, ids, stream
        self.length = len(ids) * view.shape[1]

    def read(self, at: int, length: int) -> memoryview:
        """See Storage."""
        page = self._view.shape[1]
        first, last = at // page, -(-(at + length) // page)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            pages = self._view.index_select(0, _rows(self._view, self._ids[first:last])).cpu()
        return host_bytes(pages.view(torch.uint8).view(-1))[at - first * page :][:length]

    def run(self, at: int, length: int) -> None:
        """They do not lie one after another."""
        return None


def _rows(view: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long, device=view.device)


@answering
@torch.inference_mode()
def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Verify this rank's file, then put pages into blocks that nobody uses.

    Args:
        options: ``path``; ``blocks`` of the pool; ``slots`` of the file and ``ids`` of the blocks that they go to;
            ``model``: the model id; ``layout`` without regions.
    """
    phases = Phases()
    own = dataclasses.replace(identity(worker), model=options["model"])
    found = regions(worker, options["blocks"])
    wanted = _layout(options["layout"], found)
    with collection_paused(), open_rank(options["path"], own.parallel.rank) as opened:
        header, index = opened.snapshot.header, opened.snapshot.index
        require(header.identity, own, options["path"])
        if header.kv is None:
            raise MismatchError(f"{options['path']!r} holds weights, not KV blocks")
        require_layout(header.kv, wanted, options["path"])
        held = count_slots(opened)
        if held <= max(options["slots"]):
            raise CorruptionError(
                f"{opened.source.name!r} holds {held} pages, page {max(options['slots'])} is needed; the set is mixed "
                "up, copy all of it again or freeze again"
            )
        phases.end("open")
        views = {PAGES + region.name: view for region, view in found}
        targets = {}
        _check_memory(options["path"], sum(tensor.bytes for tensor in index.tensors))
        for tensor in index.tensors:
            device = (
                views[tensor.name].device if tensor.name in views and _fits(views[tensor.name], tensor.bytes) else "cpu"
            )
            targets[tensor.name] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)
        phases.end("room")
        done = restore(opened.source, opened.snapshot, targets, set(), RestoreOptions())
        phases.add({name: value for name, value in done.seconds.items() if name != "total"}, "close")
    for name, view in views.items():
        _scatter(view, targets[name], options["slots"], options["ids"])
    for device in {view.device for view in views.values() if view.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    phases.end("scatter")
    return {"bytes": sum(region.page for region, _ in found) * len(options["ids"]), "phases": phases.seconds}


def _layout(shared: dict[str, Any], found: list[tuple[Region, torch.Tensor]]) -> Layout:
    return Layout.from_json(shared | {"regions": [region.to_json() for region, _ in found]})


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


def regions(worker: Any, blocks: int) -> list[tuple[Region, torch.Tensor]]:
    """The memory of which every block has a page: what it is, and its bytes as ``(blocks, page)``, int8.

    Layers of several groups may share memory; it is listed once.

    Args:
        blocks: of the pool; the first dimension of every tensor, or a divisor of it.

    Raises:
        UnsupportedError: a tensor that is laid out in no way known here.
    """
    found: list[tuple[Region, torch.Tensor]] = []
    seen: set[tuple[int, int, int]] = set()
    for layer, tensors in versions.kv_tensors(worker).items():
        for number, tensor in enumerate(tensors):
            if tensor.shape[0] % blocks:
                raise UnsupportedError(
                    f"the KV cache of {layer!r} has {tensor.shape[0]} rows for {blocks} blocks: a layout not known here"
                )
            if tensor.shape[0] != blocks:  # the kernel's blocks are parts of the manager's
                tensor = tensor.unflatten(0, (blocks, -1))  # type: ignore[no-untyped-call]
            item, shape, stride = tensor.element_size(), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
            step = tensor.stride(0) * item
            page = item * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))
            if page != tensor[0].numel() * item or page > step:
                raise UnsupportedError(f"the KV cache of {layer!r} has blocks with gaps; this layout is not known")
            place = (tensor.data_ptr(), step, page)
            if place in seen:
                continue
            seen.add(place)
            raw = torch.empty(0, dtype=torch.int8, device=tensor.device).set_(tensor.untyped_storage())
            view = raw.as_strided((blocks, page), (step, 1), tensor.storage_offset() * item)
            found.append((Region(f"{layer}#{number}", dtype_name(tensor.dtype), shape, stride, page), view))
    if not found:
        raise UnsupportedError("this engine has no KV cache that thaw knows")
    return found


def _check_memory(path: str, size: int) -> None:
    """A file is verified whole before a page of it is used; the kernel would end this process if that were too much."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    if size > _IN_MEMORY * free:
        raise SpaceError(
            f"{path!r} holds {size / 1e9:.2f} GB of pages, and {free / 1e9:.2f} GB of memory are free to verify them; "
            "make room, or freeze fewer prefixes in a file"
        )


def _fits(view: torch.Tensor, size: int) -> bool:
    if view.device.type != "cuda":
        return False
    return size < _ON_DEVICE * torch.cuda.mem_get_info(view.device)[0]


def _scatter(view: torch.Tensor, pages: torch.Tensor, slots: list[int], ids: list[int]) -> None:
    """``pages[slots[i]]`` to block ``ids[i]``."""
    pages = pages.view(torch.int8)
    into = torch.tensor(ids, dtype=torch.long, device=view.device)
    taken = torch.tensor(slots, dtype=torch.long, device=pages.device)
    at = len(ids) if pages.device == view.device else max(1, _PIECE // view.shape[1])
    for first in range(0, len(ids), max(at, 1)):
        part = pages.index_select(0, taken[first : first + at]).to(view.device)
        view.index_copy_(0, into[first : first + at], part)
