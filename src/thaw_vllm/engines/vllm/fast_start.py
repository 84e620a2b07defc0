"""The preset that shortens a start of vLLM, what it trades for that, and where a start leaves what it has compiled.

Needs no vLLM: it is chosen by a command that starts vLLM elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StorageError, UsageError

SIZES = (1, 2, 4, 8)
"""Tokens of a step for which CUDA graphs are captured. vLLM's own sizes begin with these (``_set_cudagraph_sizes`` in
vllm/config/vllm.py), so that a token each for up to 8 requests is padded, and computed, as without the preset."""
PLAN = "VLLM_ENABLE_STARTUP_PLAN"
BUNDLE = "VLLM_USE_MEGA_AOT_ARTIFACT"
"""Has vLLM keep all that torch.compile made of a model as one file, and load that instead of going through the model
piece by piece once more. vLLM does so by itself from PyTorch 2.12 (``use_mega_aot_artifact`` in vllm/envs.py)."""
_BUNDLED = {
    "VLLM_USE_AOT_COMPILE": "1",
    "VLLM_USE_STANDALONE_COMPILE": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "0",
    "VLLM_BATCH_INVARIANT": "0",
}
"""What these must be where they are set: otherwise vLLM keeps no such file, or refuses to start if it should."""
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
    *("optimization_level", "O", "performance_mode", "config"),
    *("speculative_config", "sc", "spec_method", "spec_model", "spec_tokens"),
}
"""Arguments of vLLM that say something about graphs, files that may, and drafts of several tokens, which need other
sizes; whoever gives one has chosen."""
_MEMORY = {"kv_cache_memory_bytes", "gpu_memory_utilization", "config"}
"""The same about memory. vLLM applies what it has measured whatever share of memory it may take."""


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


def fast_start(given: Mapping[str, Any], environment: Mapping[str, str], *, gpu: bool | None = None) -> FastStart:
    """The preset for a start with these arguments, none of which it overrules.

    Args:
        given: engine arguments; of a command line, what ``command_line.given`` says. None and False count as not given.
        environment: variables that the start would have without it.
        gpu: whether there is one; None to look for NVIDIA's driver.
    """
    names = [name for name, value in given.items() if value is not None and value is not False]
    args: dict[str, Any] = {}
    variables: dict[str, str] = {}
    if not (has_gpu(environment) if gpu is None else gpu):
        return FastStart(args, variables, ["nothing to choose: there is no GPU, so no graphs and no memory to measure"])
    eager = among(names, {"enforce_eager"})
    if eager:
        said = ["no CUDA graphs, as you chose"]
    elif among(names, _GRAPHS):
        said = ["CUDA graphs as you chose"]
    else:
        args["cudagraph_capture_sizes"] = list(SIZES)
        said = [
            f"CUDA graphs are captured for steps of {', '.join(map(str, SIZES))} tokens only: prompts, and more than "
            f"{SIZES[-1]} requests at once, run without them, slower; give --cudagraph-capture-sizes for others"
        ]
    if not eager and BUNDLE not in environment and can_bundle(environment):
        variables[BUNDLE] = "1"
        said.append(
            "what is compiled is kept as one file, which is loaded sooner; what earlier starts kept in pieces may be "
            f"compiled once more ({BUNDLE}=0 leaves it so)"
        )
    if among(names, _MEMORY) or environment.get(PLAN) == "0":
        said.append("memory for the KV cache as you chose")
    else:
        variables[PLAN] = "1"
        said.append(
            "memory for the KV cache is what an earlier start with the same configuration measured, while as much is "
            "free; it is not measured again"
        )
    return FastStart(args, variables, said)


def can_bundle(environment: Mapping[str, str]) -> bool:
    """Whether vLLM keeps compiled code as one file if BUNDLE says so, all else being as it is."""
    return all(environment.get(name, value) == value for name, value in _BUNDLED.items())


def among(names: Iterable[str], known: set[str]) -> bool:
    """Whether one of these is meant, perhaps shortened, as argparse allows."""
    return any(name in known or (len(name) > 2 and any(full.startswith(name) for full in known)) for name in names)


@contextlib.contextmanager
def set_meanwhile(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with these, and as it was afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def cache_variables(directory: str | os.PathLike[str] | None) -> dict[str, str]:
    """Variables with which a start keeps what it compiles in this directory, which is made; None where no one chose.

    Raises:
        UsageError: the name is empty.
        StorageError: it cannot be made, or not be written to.
    """
    if directory is None:
        return {}
    if not os.fspath(directory):
        raise UsageError("--cache-dir is empty; give a directory")
    path = Path(os.path.realpath(Path(directory).expanduser()))  # one name, since a zygote compares it
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"no caches can be kept in {str(path)!r}: {error.strerror}; give another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"no caches can be kept in {str(path)!r}: it may not be written to; give another")
    return {variable: str(path / name) for variable, name in CACHES.items()}


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether NVIDIA's driver is there, and a process with this environment may see a GPU; no driver is initialised."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
