"""The workers' part: pages of blocks, gathered from the KV cache and scattered into it; called through collective_rpc.

Arguments and results are plain values. A failure is an answer, ``{"error": class name, "message": text}``: an exception
would take the whole engine down.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from ....errors import CorruptionError, MismatchError, ThawError, UnsupportedError
from ....format.header import Header
from ....format.identity import Identity, require
from ....format.kv import PAGES, Layout, Region, require_layout
from ....kv.read import count_slots
from ....transport.collector import collection_paused
from ....weights.capture import Named, capture
from ....weights.freeze import FreezeOptions
from ....weights.layout import dtype_name
from ....weights.open import open_rank
from ....weights.ranks import freeze_rank
from ....weights.restore import RestoreOptions, reading, restore
from .. import versions
from ..exchange import world_exchange
from ..identity import engine_identity

_ON_DEVICE = 0.5
"""Share of a GPU's free memory that gathered pages may take; more of them pass through host memory."""
_PIECE = 64 << 20
"""Bytes that are gathered or scattered at once where they pass through host memory."""


def answering(work: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Turn a failure into an answer."""

    @functools.wraps(work)
    def answer(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.inference_mode():
                return work(worker, options)
        except ThawError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            return {"error": "ThawError", "message": f"unexpected {type(error).__name__}: {error}"}

    return answer


@answering
def describe(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """This rank's identity, and how many regions it has: that there are some, of known layouts."""
    found = regions(worker, options["blocks"])
    return {"identity": identity(worker).to_json(), "regions": len(found)}


@answering
def freeze(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's pages, rank 0 the table of blocks too.

    Args:
        options: ``path``, ``force``; ``blocks`` of the pool; ``ids`` of the blocks by slot; ``layout`` without regions;
            ``model``: the model id; ``table``: name to dtype, shape and bytes; ``writer``.
    """
    own = identity(worker)
    found = regions(worker, options["blocks"])
    layout = _layout(options["layout"], found)
    named: list[Named] = []
    if own.parallel.rank == 0:
        for name, (dtype, shape, data) in options["table"].items():
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            named.append((name, "tensor", whole.view(getattr(torch, dtype)).view(shape)))
    named += [(PAGES + region.name, "tensor", _gather(view, options["ids"])) for region, view in found]
    header = Header(identity=own, writer=options["writer"], kv=layout)
    report = freeze_rank(
        options["path"],
        header,
        capture(named),
        FreezeOptions(force=options["force"]),
        world_exchange(),
        lambda: options["model"],
    )
    return dataclasses.asdict(report)


@answering
def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Verify this rank's file, then put pages into blocks that nobody uses.

    Args:
        options: ``path``; ``blocks`` of the pool; ``slots`` of the file and ``ids`` of the blocks that they go to;
            ``model``: the model id; ``layout`` without regions.
    """
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
        views = {PAGES + region.name: view for region, view in found}
        targets = {}
        for tensor in index.tensors:
            device = (
                views[tensor.name].device if tensor.name in views and _fits(views[tensor.name], tensor.bytes) else "cpu"
            )
            targets[tensor.name] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)
        restore_options = RestoreOptions()
        with reading(opened.source, targets.values(), restore_options) as way:
            report = restore(opened.source, opened.snapshot, targets, set(), restore_options, way)
    for name, view in views.items():
        _scatter(view, targets[name], options["slots"], options["ids"])
    for device in {view.device for view in views.values() if view.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return {"bytes": sum(region.page for region, _ in found) * len(options["ids"]), "read": report.bytes}


def _layout(shared: dict[str, Any], found: list[tuple[Region, torch.Tensor]]) -> Layout:
    return Layout.from_json(shared | {"regions": [region.to_json() for region, _ in found]})


def identity(worker: Any) -> Identity:
    """Of this rank's KV cache, the model id left open.

    Raises:
        UnsupportedError: what makes keys and values depend on more than the identity says.
    """
    config = worker.vllm_config
    if config.speculative_config is not None and getattr(config.speculative_config, "draft_model_config", None):
        raise UnsupportedError("KV blocks of engines with a draft model are not supported in this version")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError(
            "KV scales that are computed while running are not stored; use calculate_kv_scales=False"
        )
    found = engine_identity(config, config.model_config)
    return dataclasses.replace(found, stage="kv")


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


def _fits(view: torch.Tensor, size: int) -> bool:
    if view.device.type != "cuda":
        return False
    return size < _ON_DEVICE * torch.cuda.mem_get_info(view.device)[0]


def _gather(view: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Pages of blocks, one after another: ``(len(ids), page)``, uint8."""
    rows = torch.tensor(ids, dtype=torch.long, device=view.device)
    if view.device.type == "cpu" or _fits(view, len(ids) * view.shape[1]):
        return view.index_select(0, rows).view(torch.uint8)
    found = torch.empty((len(ids), view.shape[1]), dtype=torch.int8, device="cpu")
    at = max(1, _PIECE // view.shape[1])
    for first in range(0, len(ids), at):
        found[first : first + at] = view.index_select(0, rows[first : first + at]).cpu()
    return found.view(torch.uint8)


def _scatter(view: torch.Tensor, pages: torch.Tensor, slots: list[int], ids: list[int]) -> None:
    """``pages[slots[i]]`` to block ``ids[i]``."""
    pages = pages.view(torch.int8)
    into = torch.tensor(ids, dtype=torch.long, device=view.device)
    taken = torch.tensor(slots, dtype=torch.long, device=pages.device)
    at = len(ids) if pages.device == view.device else max(1, _PIECE // view.shape[1])
    for first in range(0, len(ids), max(at, 1)):
        part = pages.index_select(0, taken[first : first + at]).to(view.device)
        view.index_copy_(0, into[first : first + at], part)
