"""How much of a GPU's memory is in use, by whomever."""

from __future__ import annotations

import os
import subprocess


def gpu_mib() -> float | None:
    """MiB in use on the first visible GPU; None where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        told = subprocess.run([*command, "-i", chosen], capture_output=True, text=True, timeout=30, check=True).stdout
        return float(told.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
