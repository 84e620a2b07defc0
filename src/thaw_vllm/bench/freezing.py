"""``thaw bench freeze``: thaw and the rivals that can write a model put one from the device into a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import ceilings, rounds
from .files import check_room
from .llama import Shape, shape_for
from .outcome import Missed, Outcome, Say
from .record import Record, file_system_of
from .rivals import OURS
from .rounds import Entry, Sample
from .summary import recorded
from .systems import SAFETENSORS
from .weights import present

TMPFS, DISK = "freeze-tmpfs", "freeze-disk"
WRITES = {TMPFS: "tmpfs-write", DISK: "disk-write"}
"""The limit of each work's medium; the other one is ``d2h``."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        directories: where files are written and removed.
        systems: names; those that cannot write are passed over.
        size_gb: of the model.
        runs: fresh processes a system gets.
        limits: how limits are measured; its ``device`` is where the model is.
    """

    directories: tuple[Path, ...]
    systems: tuple[str, ...]
    size_gb: float
    runs: int
    limits: ceilings.Settings


def measure(settings: Settings, say: Say) -> Outcome:
    """Everything.

    Raises:
        SpaceError: no room for a file.
    """
    outcome, shape = Outcome(), shape_for(settings.size_gb)
    systems, missed = present(settings.systems, settings.limits.device)
    outcome.missed += [Missed("freeze", name, "", why) for name, why in missed.items()]
    if settings.limits.device != "cpu":
        outcome += ceilings.link("d2h", settings.limits, say)
    for directory in settings.directories:
        check_room(directory, int(1.02 * shape.bytes) + (1 << 20), "give a smaller --size-gb or another --dir")
        work = TMPFS if ceilings.on_memory(directory) else DISK
        outcome += ceilings.measure([WRITES[work]], [directory], settings.limits, say)
        with ceilings.scratch(directory) as path:
            entries = [
                Entry(candidate.name, "", "freeze", _request(candidate.name, settings, shape, path))
                for candidate in systems
                if candidate.freezes
            ]
            samples, failed = rounds.run(work, entries, settings.runs, lambda _: None, say, [directory])
        outcome.missed += failed
        outcome.records += [
            _record(work, entry, samples[entry.name], shape, directory) for entry in entries if samples[entry.name]
        ]
    return outcome


def _request(name: str, settings: Settings, shape: Shape, path: Path) -> dict[str, Any]:
    return {"system": name, "device": settings.limits.device, "shape": asdict(shape), "path": str(path)}


def _record(work: str, entry: Entry, samples: Sequence[Sample], shape: Shape, directory: Path) -> Record:
    answers = [sample.answer for sample in samples]
    different = next((answer["different"] for answer in answers if answer["different"]), None)
    peaks = [sample.process_mib for sample in samples if sample.process_mib is not None]
    extra: dict[str, Any] = {
        "directory": str(directory),
        "file_size": answers[-1]["file_size"],
        "machine_mib": max(sample.machine_mib for sample in samples),
    }
    extra |= {key: answers[-1][key] for key in ("why", "phases") if key in answers[-1]}
    if different is not None:
        extra["different"] = different
    named, system = recorded(work, entry.system)
    return Record(
        named,
        system,
        answers[-1].get("route") or ("freeze_model" if system == OURS else SAFETENSORS),
        shape.bytes,
        [answer["seconds"] for answer in answers],
        "warm",
        False,
        different is None,
        max(peaks, default=None),
        extra,
        file_system_of(directory),
    )
