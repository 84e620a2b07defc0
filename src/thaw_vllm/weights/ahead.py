"""What a restore needs beside its file: kept by a process between restores, and made ready for one to come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import torch

from ..errors import UsageError
from ..transport.kept_helpers import ANNOUNCED, KeptHelpers
from ..transport.links import by_driver

_kept: dict[int, KeptHelpers] = {}
os.register_at_fork(after_in_child=_kept.clear)  # they are the parent's


def kept(device: torch.device) -> KeptHelpers:
    """This process's for a GPU; they end with it."""
    return _kept.setdefault(device.index or 0, KeptHelpers())


def expect(device: torch.device) -> None:
    """Have helpers come up and page-lock their slots, and the kernels loaded; they wait for a restore ten minutes."""
    if by_driver(device):
        kept(device).start(device.index or 0, ANNOUNCED)


def expect_peer(device: torch.device) -> None:
    """Have the kernel that sums loaded: of what a restore from a file needs, one from a peer takes nothing else."""
    if by_driver(device):
        with contextlib.suppress(RuntimeError):  # no thread; who needs it loads it
            kept(device).load(device.index or 0, decoders=False)


def expect_restore(device: torch.device | str | int = "cuda") -> None:
    """Say that a model will be restored to a GPU in the next ten minutes: what that needs comes up meanwhile.

    Some 50 ms of a restore are otherwise processes that start, memory that is page-locked and kernels that the driver
    translates. Call it before the model is built. What came up is kept from one restore to the next, and ends by
    itself when none has come for a while. For other devices there is nothing to do.

    Args:
        device: as torch names it, or its number.

    Raises:
        UsageError: torch knows no such device.
    """
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{device!r} is no device: {error}") from None
    if by_driver(found):
        count, index = torch.cuda.device_count(), getattr(found, "index", None)
        if (index or 0) >= count:
            raise UsageError(f"there is no GPU {index or 0}; torch finds {count}")
        torch.cuda.init()  # type: ignore[no-untyped-call]  # so that whoever would fork this process sees that it has a GPU's context
        expect(torch.device(found.type, torch.cuda.current_device() if index is None else index))


def rest(device: torch.device) -> None:
    """End what waits for a restore to a GPU that will not come, or has been."""
    if (device.index or 0) in _kept:
        kept(device).rest()


def ready(targets: Iterable[torch.Tensor]) -> KeptHelpers | None:
    """Those that somebody expects a restore with, if these tensors are on one GPU, or on it and the host."""
    gpus = {target.device.index or 0 for target in targets if by_driver(target.device)}
    return _kept.get(gpus.pop()) if len(gpus) == 1 else None
