"""The directories in which engines and compilers keep what they have made, and what of it is not another machine's.

A path in a file of caches begins with a place's name. ``vllm`` holds most: what torch.compile made, noted facts about
models, measured memory.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 24
"""Parts of a path."""
_MAX_PATH, _MAX_NAME = 1024, 235
"""Bytes of a path and of a part; while a file is written its name has 20 more."""
TRITON, VLLM = "triton", "vllm"


@dataclass(frozen=True)
class Place:
    """One of them.

    Attributes:
        name: here and in files.
        directory: absolute.
    """

    name: str
    directory: Path


def places(environment: Mapping[str, str]) -> dict[str, Place]:
    """Where a start with these variables keeps things, by name.

    As vLLM (``VLLM_CACHE_ROOT`` in vllm/envs.py), Triton (``knobs.cache``), PyTorch (``cache_dir_utils``), FlashInfer
    (``jit/env.py``), DeepGEMM (vllm/utils/deep_gemm.py) and the driver choose them.

    Raises:
        RuntimeError: a home directory is needed and there is none.
    """
    said = environment.get
    home = Path(said("HOME") or os.path.expanduser("~"))
    if not home.is_absolute():
        raise RuntimeError("there is no home directory")
    cache = Path(said("XDG_CACHE_HOME") or home / ".cache")
    vllm = Path(os.path.expanduser(said("VLLM_CACHE_ROOT") or cache / "vllm"))
    triton = said("TRITON_CACHE_DIR") or Path(said("TRITON_HOME") or home) / ".triton" / "cache"
    inductor = said("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{_user()}")
    flashinfer = Path(said("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer"
    found = {
        VLLM: vllm,
        TRITON: Path(triton),
        "inductor": Path(inductor),
        "flashinfer": flashinfer,
        "deep-gemm": Path(said("DG_JIT_CACHE_DIR") or vllm / "deep_gemm"),
        "cuda": Path(said("CUDA_CACHE_PATH") or home / ".nv" / "ComputeCache"),
    }
    return {name: Place(name, Path(os.path.abspath(directory))) for name, directory in found.items()}


def empty(directory: Path) -> dict[str, str]:
    """Variables with which a start keeps all of it below a directory, laid out as where nobody has chosen."""
    return {
        "VLLM_CACHE_ROOT": str(directory / VLLM),
        "TRITON_HOME": str(directory / "triton-home"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "FLASHINFER_WORKSPACE_BASE": str(directory / "flashinfer-home"),
        "CUDA_CACHE_PATH": str(directory / "cuda"),
    }


UNSET = ("TRITON_CACHE_DIR", "DG_JIT_CACHE_DIR", "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR")
"""Variables that such a start must not have."""

_LEFT_OUT = re.compile(
    r"^vllm/(?:gpu_p2p_access_cache_for_|assets(?:/|$)|dummy_cache(?:/|$)|deep_gemm(?:/|$)|xla_cache(?:/|$)|thaw(?:/|$)|"
    r"startup_plan/(?!startup_plan_thaw-)|torch_compile_cache/(?!torch_aot_compile/thaw-[0-9a-f]{64}/)|usage_stats\.json$)"
    r"|(?:^|/)(?:[^/]*\.lock|lock|locks|\.[^/]*|tmp\.[^/]*|[^/]*\.tmp|__pycache__)(?:/|$)"
)
"""What is of this machine alone (which GPUs reach each other), of no start (assets), named for a model's path, a lock,
or was being made."""


def is_path(path: str) -> bool:
    """Whether it can be one: a place's name and parts below it, which every file system takes, staged names as well."""
    parts = path.split("/")
    if not 2 <= len(parts) <= MAX_DEPTH or not path.isprintable() or "\\" in path:
        return False
    sizes = [len(part.encode()) for part in parts]
    return (
        sum(sizes) + len(parts) - 1 <= _MAX_PATH
        and all(1 <= size <= _MAX_NAME for size in sizes)
        and not ({".", ".."} & {*parts})
    )


def carried(path: str) -> bool:
    """Whether a path, relative and beginning with a place's name, is what another machine can use."""
    return _LEFT_OUT.search(path) is None


def files(place: Place) -> Iterator[tuple[str, Path]]:
    """What of a place is carried, in order: the path in a file of caches, and where it lies. Links are left out."""
    for folder, folders, names in os.walk(place.directory):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            relative = f"{place.name}/{path.relative_to(place.directory).as_posix()}"
            if is_path(relative) and carried(relative) and path.is_file() and not path.is_symlink():
                yield relative, path


def _user() -> str:
    """As PyTorch names its directory (``default_cache_dir``)."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return re.sub(r'[\\/:*?"<>|]', "_", name)
