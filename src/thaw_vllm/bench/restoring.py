"""The child's side of restoring: one system, one run, or several from memory that stays pinned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import llama
from .child import Steps
from .device import opened, settle, timed
from .digest import digests, first_difference
from .rivals import system
from .systems import Restored


def restore(request: dict[str, Any]) -> Steps:
    """``system``, ``device``, ``shape``, ``paths``, ``verify``, ``digests``; see Restored for the answer's fields."""
    device, ours = opened(request["device"]), system(request["system"])
    ours.prepare(device)
    yield
    target = llama.poisoned(llama.Shape(**request["shape"]), device) if ours.in_place else None
    paths = [Path(path) for path in request["paths"]]
    settle(device)
    yield
    seconds, found = timed(lambda: ours.restore(paths, device, target, request["verify"]), device)
    yield
    return {"seconds": seconds, **answer(found, found.tensors, request, device)}


def warm(request: dict[str, Any]) -> Steps:
    """The same with ``runs``: every run restores from the same pinned memory into tensors overwritten before it."""
    device, ours = opened(request["device"]), system(request["system"])
    ours.prepare(device)
    yield
    target = llama.poisoned(llama.Shape(**request["shape"]), device)
    settle(device)
    start = time.perf_counter()
    with ours.pinned([Path(path) for path in request["paths"]], device) as again:
        pinning = time.perf_counter() - start
        found = again(target, request["verify"])  # not counted: the first use of the kernels and streams
        yield
        seconds, answers = [], []
        for _ in range(request["runs"]):
            llama.poison(target.tensors)
            took, found = timed(lambda: again(target, request["verify"]), device)
            seconds.append(took)
            answers.append(answer(found, target.tensors, request, device))
        yield
    wrong = [answer for answer in answers if not answer["equal"]]
    return {"seconds": seconds, "pin_seconds": pinning, **(wrong or answers)[0]}


TASKS = {"restore": restore, "warm": warm}


def answer(
    found: Restored, tensors: Mapping[str, torch.Tensor], request: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What a child says of a restore, beside its seconds; ``request`` has the ``digests`` that tensors should have."""
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device.type]
    different = elsewhere[0] if elsewhere else first_difference(digests(tensors), request["digests"])
    return {
        "equal": different is None,
        "different": different,
        "route": found.route,
        "why": found.why,
        "phases": dict(found.phases),
        "stored": found.stored,
    }
