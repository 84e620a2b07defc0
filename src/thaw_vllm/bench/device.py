"""The device a benchmark runs on, in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import UsageError

T = TypeVar("T")


def opened(name: str) -> torch.device:
    """The device, its context made, so that no run pays for that.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"torch finds no GPU for {name!r}; --device cpu measures without")
    device = torch.device("cuda", torch.device(name).index or 0)
    torch.cuda.set_device(device)
    torch.ones(1, device=device).item()
    return device


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until ``work`` has returned and the device has done all it was asked, and what it returned."""
    settle(device)
    start = time.perf_counter()
    result = work()
    settle(device)
    return time.perf_counter() - start, result


def settle(device: torch.device) -> None:
    """Wait for everything under way on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
