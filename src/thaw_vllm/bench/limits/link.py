"""The link between host and GPU: copies of 16 MiB between page-locked memory and the device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ...errors import DeviceError
from ...transport import parallel
from ..child import Steps
from ..device import opened, timed

COPY = 16 << 20
REGION = 1 << 30
"""Host memory that is copied from again and again; more would measure the same."""
PARTS = 16


class Pinned:
    """An anonymous region in huge pages, touched and registered in parallel. A context manager.

    Not torch's ``pin_memory``: that is slow to make and rounds up to powers of two.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        cuda: Any = torch.cuda
        self._runtime: Any = cuda.cudart()
        self._step = -(-size // PARTS)
        self._registered: list[int] = []

    def __enter__(self) -> Pinned:
        try:
            parallel.run(range(0, self.tensor.numel(), self._step), self._register, PARTS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _register(self, at: int) -> None:
        address, length = self.tensor.data_ptr() + at, min(self._step, self.tensor.numel() - at)
        ctypes.memset(address, 0xA5, length)
        result = self._runtime.cudaHostRegister(address, length, 0)
        if int(result):
            raise DeviceError(f"cudaHostRegister failed: {result}; the limit of locked memory may be low (ulimit -l)")
        self._registered.append(address)

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        for address in self._registered:
            self._runtime.cudaHostUnregister(address)
        self._registered.clear()


def _copies(request: dict[str, Any], to_device: bool) -> Steps:
    """``bytes`` and ``runs`` of the request; seconds of every run after one that is not counted."""
    device = opened(request["device"])
    yield
    with ExitStack() as stack:
        size = max(COPY, request["bytes"] // COPY * COPY)
        region = stack.enter_context(Pinned(min(REGION, size)))
        there = torch.empty(region.tensor.numel(), dtype=torch.uint8, device=device)
        pieces = [slice(at, at + COPY) for at in range(0, there.numel(), COPY)]
        pairs = [(there[piece], region.tensor[piece]) for piece in pieces]
        work = _work(pairs if to_device else [(b, a) for a, b in pairs], size // COPY)
        timed(work, device)
        yield
        seconds = [timed(work, device)[0] for _ in range(request["runs"])]
        yield
    return {"seconds": seconds, "bytes": size, "route": "registered, 16 MiB copies", "threads": 1}


def _work(pairs: list[tuple[torch.Tensor, torch.Tensor]], copies: int) -> Callable[[], None]:
    def work() -> None:
        for number in range(copies):
            to, source = pairs[number % len(pairs)]
            to.copy_(source, non_blocking=True)

    return work


def h2d(request: dict[str, Any]) -> Steps:
    """Host to device."""
    return _copies(request, to_device=True)


def d2h(request: dict[str, Any]) -> Steps:
    """Device to host."""
    return _copies(request, to_device=False)


TASKS = {"h2d": h2d, "d2h": d2h}
