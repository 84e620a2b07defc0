"""A worker's part of parking: memory that nobody needs is given back before the driver has to carry it."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from ....errors import DeviceError
from ....weights import ahead
from .. import versions
from . import pins
from .fill import still_there


def trim(worker: Any) -> dict[str, Any]:
    """Return what PyTorch keeps at hand, and end what thaw keeps: page-locked snapshots, and helpers of restores.

    Returns:
        ``left``: bytes of the GPU's memory that are in use, by other processes, too.
    """
    device = next(worker.get_model().parameters()).device
    pins.release_all()
    ahead.kept(device).close()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"left": total - free}


def process(worker: Any) -> dict[str, Any]:
    """``pid`` of this worker."""
    return {"pid": os.getpid()}


def wakeable(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whether what waking needs is there: the snapshot, if there is one, and room on the GPU.

    Args:
        options: ``path``, ``contents``: as of ``still_there``; None for weights in host memory.

    Raises:
        MismatchError, StorageError: the snapshot is not.
        DeviceError: others have taken the memory.
    """
    if options["path"] is not None:
        still_there(worker, options)
    wanted = versions.sleeping_bytes()
    if wanted:
        free, _ = torch.cuda.mem_get_info()
        if free < wanted:
            raise DeviceError(
                f"the engine needs {wanted / 1e9:.2f} GB of its GPU, of which {free / 1e9:.2f} are free; end what has "
                "taken them, and wake it then"
            )
    return {}
