"""The preset that shortens a start of vLLM, what it trades for that, and where a start leaves what it has compiled.

Needs no vLLM: it is chosen by a command that starts vLLM elsewhere.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StorageError

SIZES = (1, 2, 4, 8)
"""Batches for which CUDA graphs are captured. vLLM's own sizes begin with these, so that a batch of up to 8 is padded,
and computed, as it would be without the preset."""
PLAN = "VLLM_ENABLE_STARTUP_PLAN"
CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": "flashinfer-autotune",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "DG_JIT_CACHE_DIR": "deep-gemm",
}
"""Variables that name where a start finds what an earlier one has compiled, tuned or measured → directories of our own
choice below one that is given."""
_GRAPHS = {
    *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "compilation_config", "cc"),
    *("optimization_level", "O", "config"),
}
"""Arguments of vLLM that say something about graphs, or a file that may; whoever gives one has chosen."""


@dataclass(frozen=True)
class FastStart:
    """What is added to a start.

    Attributes:
        engine_args: of vLLM.
        environment: of the process.
        said: what was chosen and what that costs, a line each.
    """

    engine_args: dict[str, Any]
    environment: dict[str, str]
    said: list[str]


def fast_start(given: Iterable[str], environment: Mapping[str, str], *, gpu: bool | None = None) -> FastStart:
    """The preset for a start with these arguments, none of which it overrules.

    Args:
        given: names of the engine arguments that were given, as Python or as the command line has them; a part of one
            (``compilation_config.mode``) counts.
        environment: variables that the start would have without it.
        gpu: whether there is one; None to look for NVIDIA's driver.
    """
    names = {name.lstrip("-").replace("-", "_").partition(".")[0] for name in given}
    names |= {"O" for name in names if name[:1] == "O" and name[1:].isdigit()}
    args: dict[str, Any] = {}
    variables: dict[str, str] = {}
    if not (_driver() if gpu is None else gpu):
        return FastStart(args, variables, ["nothing to choose: there is no GPU, so no graphs and no memory to measure"])
    sizes = ", ".join(map(str, SIZES))
    if "enforce_eager" in names:
        said = ["no CUDA graphs, as you chose"]
    elif names & _GRAPHS:
        said = ["CUDA graphs as you chose"]
    else:
        args["cudagraph_capture_sizes"] = list(SIZES)
        said = [
            f"CUDA graphs are captured for batches of {sizes} only: more than {SIZES[-1]} requests at once run without "
            "them, each step slower; give --cudagraph-capture-sizes for others"
        ]
    if "kv_cache_memory_bytes" in names or environment.get(PLAN) == "0":
        said.append("memory for the KV cache as you chose")
    else:
        variables[PLAN] = "1"
        said.append(
            "memory for the KV cache is what an earlier start with the same configuration measured, while as much is "
            "free; it is not measured again"
        )
    return FastStart(args, variables, said)


def cache_variables(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Variables with which a start keeps what it compiles in this directory, which is made.

    Raises:
        StorageError: it cannot be made, or not be written to.
    """
    path = Path(directory).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"no caches can be kept in {str(path)!r}: {error.strerror}; give another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"no caches can be kept in {str(path)!r}: it may not be written to; give another")
    return {variable: str(path / name) for variable, name in CACHES.items()}


def _driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
