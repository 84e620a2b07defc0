"""What processes take, and how much more it is in the end than it was at first; for the soaks here."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

from thaw_vllm.bench.gpu_memory import gpu_mib
from thaw_vllm.zygote.processes import below

MOST = {"rss_mib": 64.0, "descriptors": 4, "processes": 0, "gpu_mib": 8.0}
"""That is allowed from the first quarter's median to the last one's."""


def sizes(*roots: int) -> dict[str, float]:
    """Of processes and all below them, and the GPU's memory in use."""
    pids = [pid for root in roots for pid in (root, *below(root))]
    rss = descriptors = 0
    for one in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            rss += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
            descriptors += len(os.listdir(f"/proc/{one}/fd"))
    return {"rss_mib": rss / 1024, "descriptors": descriptors, "processes": len(pids), "gpu_mib": gpu_memory(pids)}


def gpu_memory(pids: list[int]) -> float:
    """MiB of the first GPU that these processes have in use; where a container hides whose it is, all that is."""
    own = _own(pids)
    return sum(own) if own else gpu_mib() or 0.0


def whose(pids: list[int]) -> bool:
    """Whether ``gpu_memory`` can tell these processes' own."""
    return bool(_own(pids))


def _own(pids: list[int]) -> list[float]:
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits", "-i", device]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    found = [[word.strip() for word in line.split(",")] for line in lines if line.strip()]
    told = [words for words in found if all(word.isdigit() for word in words)]
    return [float(used) for pid, used in told if int(pid) in pids]


def growth(seen: list[dict[str, float]]) -> dict[str, float]:
    """From the first quarter's median to the last one's."""
    if len(seen) < 4:
        return {}
    quarter = len(seen) // 4
    ends = seen[:quarter], seen[-quarter:]
    first, last = ({name: median([one[name] for one in end]) for name in MOST} for end in ends)
    return {name: round(last[name] - first[name], 1) for name in MOST}


def too_much(grown: dict[str, float]) -> bool:
    """Whether that is more than is allowed."""
    return any(value > MOST[name] for name, value in grown.items())


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def summary(values: list[float]) -> dict[str, Any]:
    """Of seconds."""
    if not values:
        return {}
    return {"count": len(values), "median": median(values), "min": min(values), "max": max(values)}
