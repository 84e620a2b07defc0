"""The child's side of what GPUs have from each other: a peer's weights, one read for several, plain copies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import thaw_vllm

from ..transport.peer_token import VARIABLE
from ..weights.ahead import expect_peer
from ..weights.capture import fillable
from ..weights.open import open_snapshot
from ..weights.peers import AUTO, offer, take
from ..weights.reading import RestoreOptions
from ..weights.restore import RestoreReport
from . import llama
from .child import Steps
from .device import opened, settle, timed
from .restoring import answer
from .systems import Restored

COPY = 8 << 30
"""Bytes of a plain copy, at most."""


def d2d(request: dict[str, Any]) -> Steps:
    """Torch's own copy of ``bytes`` from device ``device`` to device ``to``, ``runs`` times."""
    size = min(request["bytes"], COPY)
    source, target = opened(request["device"]), opened(request["to"])
    yield
    one = torch.ones(size, dtype=torch.uint8, device=source)
    other = torch.empty(size, dtype=torch.uint8, device=target)
    other.copy_(one)
    settle(source)
    settle(target)
    yield
    seconds = []
    for _ in range(request["runs"]):
        settle(source)
        seconds.append(timed(lambda: other.copy_(one), target)[0])
    yield
    return {"seconds": seconds, "bytes": size}


def lend(request: dict[str, Any]) -> Steps:
    """A process with the weights of ``path`` on ``device``, who offers them in ``place`` until it is ended."""
    device = opened(request["device"])
    yield
    own = llama.poisoned(llama.Shape(**request["shape"]), device)
    thaw_vllm.restore_model(own, request["path"])
    with open_snapshot(request["path"], with_chunks=False) as found:
        made = offer(found, *fillable(own), lambda: None, Path(request["place"]))
    yield
    yield
    made.withdraw()
    return {}


def borrow(request: dict[str, Any]) -> Steps:
    """The same weights, taken from whoever offers them, or from ``peer``; ``digests`` of what they are."""
    device = opened(request["device"])
    if "token" in request:
        os.environ[VARIABLE] = request["token"]
    yield
    own = llama.poisoned(llama.Shape(**request["shape"]), device)
    expect_peer(device)
    settle(device)
    yield

    def work() -> RestoreReport:
        with open_snapshot(request["path"]) as found:
            return take(found, *fillable(own), RestoreOptions(), request.get("peer", AUTO), Path(request["place"]))

    seconds, report = timed(work, device)
    yield
    return _told(seconds, report, own, request, device)


def broadcast(request: dict[str, Any]) -> Steps:
    """One rank of ``ranks`` that restore ``path`` by one read; ``rendezvous`` is a file that is not there yet."""
    import torch.distributed as dist

    device = opened(request["device"])
    yield
    own = llama.poisoned(llama.Shape(**request["shape"]), device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(
        backend, f"file://{request['rendezvous']}", rank=request["rank"], world_size=request["ranks"]
    )
    if device.type == "cuda":
        dist.all_reduce(torch.ones(1, device=device))  # the first use makes the connections
        if request["rank"] == 0:
            thaw_vllm.expect_restore(device)
    settle(device)
    dist.barrier()
    yield
    seconds, report = timed(lambda: thaw_vllm.restore_model_broadcast(own, request["path"]), device)
    yield
    found = _told(seconds, report, own, request, device)
    dist.destroy_process_group()
    return found


def _told(
    seconds: float, report: RestoreReport, own: llama.Model, request: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    found = Restored(own.tensors, report.route, report.why, dict(report.seconds), None)
    return {"seconds": seconds, **answer(found, own.tensors, request, device)}


TASKS = {"d2d": d2d, "lend": lend, "borrow": borrow, "broadcast": broadcast}
