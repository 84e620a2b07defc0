"""A worker's part of parking: memory that nobody needs is given back before the driver has to carry it."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch


def trim(worker: Any) -> dict[str, Any]:
    """Return what PyTorch keeps at hand.

    Returns:
        ``pid``; ``left``: bytes of the GPU's memory that are in use, by other processes, too.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"pid": os.getpid(), "left": total - free}
