"""``thaw bench weights``: thaw and its rivals restore one model, each from its own files, each in fresh processes."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import ceilings, residency, rounds
from .files import Files, check_room, opened
from .footprint import MIB
from .llama import Shape, shape_for
from .outcome import Missed, Outcome, Say
from .process import ChildError, ask
from .record import Record, file_system_of
from .rivals import OUR_VARIANTS, OURS, RIVALS, system
from .rounds import Entry, Sample
from .summary import EXPECTED, recorded
from .systems import NATIVE, THAW, System

TMPFS, PAGECACHE, DISK, WARM = "restore-tmpfs", "restore-pagecache", "restore-disk", "restore-warm"
WORKS = (TMPFS, PAGECACHE, DISK, WARM)
CPU = "restore-cpu"
"""What they are called where the destination is host memory; ``medium`` tells them apart."""
MEDIUM = {TMPFS: "tmpfs", PAGECACHE: "pagecache", DISK: "disk", WARM: "pinned"}
VERIFIED, UNVERIFIED = "verified", "unverified"
ALL_SYSTEMS = (OURS, *OUR_VARIANTS, *RIVALS)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        directories: where the files go; tmpfs ones give TMPFS, the others PAGECACHE and DISK.
        works: of WORKS.
        systems: names; see ``rivals``.
        size_gb: of the model.
        runs, cold_runs: fresh processes a system gets, the second for DISK.
        keep: leave the files, so that the next run with the same size finds them.
        limits: how limits are measured; its ``device`` is the destination.
    """

    directories: tuple[Path, ...]
    works: tuple[str, ...]
    systems: tuple[str, ...]
    size_gb: float
    runs: int
    cold_runs: int
    keep: bool
    limits: ceilings.Settings


def measure(settings: Settings, say: Say) -> Outcome:
    """Everything; files are removed in the end, however it ends, unless ``keep``.

    Raises:
        SpaceError: no room for the files.
        ChildError: the model could not be made.
    """
    device, outcome = settings.limits.device, Outcome()
    systems, missed = present(settings.systems, device)
    works = [work for work in settings.works if any(applies(work, d) for d in settings.directories)]
    outcome.missed += [Missed(work, name, "", why) for work in works for name, why in missed.items()]
    if not systems:
        return outcome
    if device != "cpu":
        outcome += ceilings.link("h2d", settings.limits, say)
    shape = shape_for(settings.size_gb)
    pinned = False
    for directory in settings.directories:
        here = [work for work in works if applies(work, directory) and not (work == WARM and pinned)]
        with made(directory, shape, device, {s.files for s in systems}, settings.keep, say) as files:
            outcome += _limits(here, files, settings.limits, say)
            for work in here:
                outcome += _restore(work, files, shape, systems, settings, say)
        pinned = pinned or WARM in here
    return outcome


def present(names: Sequence[str], device: str) -> tuple[list[System], dict[str, str]]:
    """The systems that can take part, and why others cannot."""
    kind = device.partition(":")[0]
    found: list[System] = []
    missed: dict[str, str] = {}
    for name in names:
        candidate = system(name)
        if candidate.installed() is None:
            missed[name] = f"not installed: pip install {candidate.package}"
        elif kind not in candidate.devices:
            missed[name] = f"restores to {' and '.join(candidate.devices)} only"
        else:
            found.append(candidate)
    return found, missed


def applies(work: str, directory: Path) -> bool:
    """Whether a work can be measured there."""
    return work == WARM or (work == TMPFS) == ceilings.on_memory(directory)


@contextmanager
def made(directory: Path, shape: Shape, device: str, layouts: set[str], keep: bool, say: Say) -> Iterator[Files]:
    """The model's files below ``directory``: those of an earlier run, or new ones."""
    wanted = sorted(layouts, key=lambda layout: (layout == NATIVE, layout == THAW))
    folder = directory / f"thaw-bench-{shape.bytes}"
    files = opened(folder, shape, wanted)
    try:
        if files is None:
            shutil.rmtree(folder, ignore_errors=True)
            needed = int((1.01 * len(wanted)) * shape.bytes) + (1 << 20)
            check_room(directory, needed, "give a smaller --size-gb, fewer systems or another --dir")
            say(f"making {shape.bytes / 1e9:.2f} GB in {len(wanted)} kinds of files in {folder}")
            ask("make", {"shape": asdict(shape), "device": device, "folder": str(folder), "layouts": wanted})
            files = opened(folder, shape, wanted)
            if files is None:
                raise ChildError(
                    f"the files in {str(folder)!r} are not what was made; does something else write there?"
                )
            say(", ".join(f"{layout} files took {seconds:.1f} s" for layout, seconds in files.made.items()))
        yield files
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _limits(works: Sequence[str], files: Files, settings: ceilings.Settings, say: Say) -> Outcome:
    """Of this directory, on the files that are there."""
    outcome, path = Outcome(), max((p for paths in files.paths.values() for p in paths), key=lambda p: p.stat().st_size)
    if {TMPFS, PAGECACHE, WARM} & set(works):
        residency.fill([path])
        outcome += ceilings.one("memory-read", path, settings, say)
    if DISK in works:
        residency.drop([path])
        outcome += ceilings.one("disk-read", path, settings, say)
    for record in outcome.records:
        record.extra["directory"] = str(files.folder.parent)
    return outcome


def _restore(work: str, files: Files, shape: Shape, systems: Sequence[System], settings: Settings, say: Say) -> Outcome:
    device = settings.limits.device
    outcome = Outcome()
    entries: list[Entry] = []
    for candidate in systems:
        if work == WARM and not candidate.pins:
            continue
        if work == DISK and candidate.name.endswith(EXPECTED):
            outcome.missed.append(Missed(work, candidate.name, "", "from a disk nothing is read by what comes up"))
            continue
        if candidate.files not in files.paths:
            why = f"its file could not be made: {files.missing.get(candidate.files, 'not asked for')}"
            outcome.missed.append(Missed(work, candidate.name, "", why))
            continue
        paths = files.paths[candidate.files]
        request = {
            "system": candidate.name,
            "device": device,
            "shape": asdict(shape),
            "paths": [str(path) for path in paths],
            "digests": files.digests,
            "runs": settings.runs,
        }
        # From a disk the checksums cost nothing that can be seen; the time is better spent on another run.
        checked = [VERIFIED] if work == DISK else [VERIFIED, UNVERIFIED]
        labels = checked if candidate.name in (OURS, *OUR_VARIANTS) else [""]
        for label in labels:
            task = "warm" if work == WARM else "restore"
            entries.append(Entry(candidate.name, label, task, request | {"verify": label == VERIFIED}, tuple(paths)))
    number = 1 if work == WARM else settings.cold_runs if work == DISK else settings.runs
    named = CPU if device == "cpu" else work
    samples, failed = rounds.run(named, entries, number, cold if work == DISK else warm, say, [files.folder])
    outcome.missed += failed
    for entry in entries:
        if samples[entry.name]:
            outcome.records.append(_record(work, named, entry, samples[entry.name], files))
    return outcome


def cold(entry: Entry) -> float:
    """Have an entry's files out of the page cache; the share that stayed."""
    left = residency.drop(entry.files)
    if left > residency.COLD:
        raise ChildError(f"its files could not be made cold: {left:.1%} of them stayed in the page cache")
    return left


def warm(entry: Entry) -> float:
    """Have them in memory; the share that is there."""
    found = residency.fill(entry.files)
    if found < residency.WARM:
        raise ChildError(f"its files could not be kept in memory: {found:.1%} of them are there; is memory short?")
    return found


def _record(work: str, named: str, entry: Entry, samples: Sequence[Sample], files: Files) -> Record:
    answers = [sample.answer for sample in samples]
    seconds = [s for a in answers for s in (a["seconds"] if isinstance(a["seconds"], list) else [a["seconds"]])]
    # On the host the tensors that a system makes itself are the result, not what it took to get there.
    own = files.bytes / MIB if named == CPU and not system(entry.system).in_place else 0.0
    peaks = [max(0.0, round(s.process_mib - own, 1)) for s in samples if s.process_mib is not None]
    different = next((answer["different"] for answer in answers if answer["different"]), None)
    extra: dict[str, Any] = {
        "medium": MEDIUM[work],
        "directory": str(files.folder.parent),
        "residency": [round(sample.residency or 0.0, 4) for sample in samples],
        "machine_mib": max(sample.machine_mib for sample in samples),
        "phases": {name: round(value, 4) for name, value in answers[-1]["phases"].items()},
    }
    if answers[-1].get("stored") is not None:
        extra["stored"] = answers[-1]["stored"]
        extra["wire_gb_per_s"] = round(answers[-1]["stored"] / 1e9 / statistics.median(seconds), 3)
    if answers[-1]["why"]:
        extra["why"] = answers[-1]["why"]
    if different is not None:
        extra["different"] = different
    if "pin_seconds" in answers[-1]:
        extra["pin_seconds"] = [round(answer["pin_seconds"], 4) for answer in answers]
    return Record(
        *recorded(named, entry.system),
        answers[-1]["route"],
        files.bytes,
        seconds,
        "cold" if work == DISK else "warm",
        entry.label == VERIFIED,
        different is None,
        max(peaks, default=None),
        extra,
        file_system_of(files.folder.parent),
    )
