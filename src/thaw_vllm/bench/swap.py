"""``thaw bench swap``: other weights into a running engine, and an engine parked and woken."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..weights.open import open_snapshot
from . import ceilings
from .kv import TOKENIZERS, ask_engine, config_of
from .outcome import Outcome, Say
from .record import Record, file_system_of

WORKS = {
    "swap": ("swap", "thaw", ""),
    "swap-pinned": ("swap", "thaw", "page-locked"),
    "park": ("park", "thaw", "driver"),
    "wake": ("wake", "thaw", "driver"),
    "sleep": ("park", "vllm", "sleep-1"),
    "sleep-wake": ("wake", "vllm", "sleep-1"),
}
"""What the child calls it → work, system, route: empty for the snapshots' file system."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a model directory, for config and tokenizer.
        snapshots: that the engine is started from, and the other.
        runs: swaps there and back, and times that it is parked.
        eager: without compiling and CUDA graphs; None for that where there is no GPU.
        park: whether it is parked, too; needs a GPU.
        engine_args: further ones of vLLM.
        limits: how the link is measured; with the device ``cpu`` it is not.
    """

    model: Path
    snapshots: tuple[Path, Path]
    runs: int
    eager: bool | None
    park: bool
    engine_args: dict[str, Any]
    limits: ceilings.Settings


def measure(settings: Settings, say: Say) -> Outcome:
    """The link's limit, then one engine.

    Raises:
        StorageError: there is no such model or snapshot.
        UsageError: both snapshots hold the same.
        ThawError: the engine failed, or refused the other snapshot.
    """
    vocabulary = int(config_of(settings.model)["vocab_size"])
    size = _size(settings.snapshots)
    cpu = settings.limits.device == "cpu"
    args: dict[str, Any] = {
        "enforce_eager": cpu if settings.eager is None else settings.eager,
        "enable_sleep_mode": not cpu and settings.park,
    }
    if not any((settings.model / name).exists() for name in TOKENIZERS):
        args["skip_tokenizer_init"] = True
    args |= settings.engine_args
    outcome = Outcome()
    if not cpu:
        outcome += ceilings.link("h2d", settings.limits, say)
    with tempfile.TemporaryDirectory(prefix="thaw-") as sockets:
        request = {
            "model": str(settings.model),
            "snapshots": [str(path.absolute()) for path in settings.snapshots],
            "engine_args": args,
            "vocabulary": vocabulary,
            "runs": settings.runs,
            "pin": not cpu,
            "park": settings.park and not cpu,
            "sockets": sockets,
        }
        found = _run(request, say)
    kind = "eager" if args["enforce_eager"] else "graphs"
    outcome.records += _records(found, size, kind, settings)
    return outcome


def _run(request: dict[str, Any], say: Say) -> dict[str, Any]:
    doing = "swapping" + (", and parking" if request["park"] else "")
    return ask_engine("swap", request, "the engine", doing, say)


def _size(snapshots: tuple[Path, Path]) -> int:
    """Bytes of weights of either."""
    sizes, contents = [], []
    for path in snapshots:
        with open_snapshot(path, with_chunks=False) as opened:
            index = opened.snapshot.index
            used = {tensor.storage for tensor in index.tensors if tensor.storage is not None}
            sizes.append(sum(index.storages[storage] for storage in used))
            contents.append(opened.snapshot.header.content)
    if contents[0] == contents[1]:
        raise UsageError(
            f"{str(snapshots[0])!r} and {str(snapshots[1])!r} hold the same, so a swap would show nothing; give the "
            "snapshot of a fine-tune"
        )
    return sizes[0]


def _records(found: dict[str, Any], size: int, kind: str, settings: Settings) -> Iterator[Record]:
    place = file_system_of(settings.snapshots[0])
    for name, (work, system, route) in WORKS.items():
        if name not in found:
            continue
        told = found[name]
        extra: dict[str, Any] = {"start": kind, "engine_args": settings.engine_args, "phases": _phases(told["reports"])}
        extra |= {key: told[key] for key in ("used", "left", "pinned", "pinning") if key in told}
        route = route or place or "file"
        if name in ("park", "wake") and not all(report.get("driver", True) for report in found["park"]["reports"]):
            route, extra["why"] = "sleep mode", found["park"]["reports"][-1]["why"]
        moved = 0 if name in ("park", "sleep") else size
        verified = name in ("swap", "swap-pinned", "wake")
        yield Record(work, system, route, moved, told["seconds"], "warm", verified, told["equal"], None, extra, place)


def _phases(reports: list[dict[str, Any]]) -> dict[str, list[float]]:
    phases: dict[str, list[float]] = {}
    for report in reports:
        for name, seconds in report.get("seconds", {}).items():
            phases.setdefault(name, []).append(round(seconds, 6))
    return phases
