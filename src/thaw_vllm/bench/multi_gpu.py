"""``thaw bench multi-gpu``: the ranks of a set restored at once, each to its own GPU, and one of them alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import ceilings, residency, together
from .files import Files
from .llama import Shape, shape_for
from .outcome import Missed, Outcome, Say
from .process import ChildError
from .record import Record, file_system_of
from .rounds import Entry
from .systems import THAW
from .together import Round
from .weights import DISK, MEDIUM, PAGECACHE, TMPFS, applies, made

LINK, RESTORE = "h2d", "restore"
WORKS = (LINK, RESTORE)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        devices: one for each rank; ``cpu`` several times for a try without GPUs.
        directories: where the ranks' files go; tmpfs ones are read from memory, others from the page cache and the
            disk.
        works: of WORKS.
        size_gb: of each rank's file.
        runs, cold_runs: fresh processes a rank gets, the second from a disk.
        keep: leave the files, so that the next run with the same size finds them.
        limits: how limits are measured.
    """

    devices: tuple[str, ...]
    directories: tuple[Path, ...]
    works: tuple[str, ...]
    size_gb: float
    runs: int
    cold_runs: int
    keep: bool
    limits: ceilings.Settings


def measure(settings: Settings, say: Say) -> Outcome:
    """One rank alone and all of them at once, in turn; files are removed in the end unless ``keep``.

    Raises:
        SpaceError: no room for the files.
        ChildError: they could not be made.
    """
    outcome = Outcome()
    try:
        if LINK in settings.works:
            outcome += _link(settings, say)
        if RESTORE in settings.works:
            for directory in settings.directories:
                with _sets(directory, settings, say) as files:
                    for medium in (TMPFS, PAGECACHE, DISK):
                        if applies(medium, directory):
                            outcome += _restore(medium, files, settings, say)
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def restore_work(ranks: int) -> str:
    """What a restore of so many ranks is called."""
    return f"tp{ranks}-restore"


def _alone_and_together(settings: Settings) -> list[tuple[str, ...]]:
    devices = settings.devices
    return [devices[:1], devices] if len(devices) > 1 else [devices]


def _link(settings: Settings, say: Say) -> Outcome:
    outcome = Outcome()
    if settings.devices[0] == "cpu":
        return Outcome(missed=[Missed(LINK, "limit", "", "needs GPUs")])
    for devices in _alone_and_together(settings):
        request = {"bytes": settings.limits.size, "runs": settings.limits.runs, "threads": settings.limits.threads}
        entries = [Entry("limit", device, LINK, request | {"device": device, "path": None}) for device in devices]
        route = _route("16 MiB", len(devices))
        try:
            found = together.run(entries, lambda _: None).answers
        except ChildError as error:
            outcome.missed.append(Missed(LINK, "limit", route, str(error)))
            continue
        seconds = [max(times) for times in zip(*(answer["seconds"] for answer in found), strict=True)]
        size = sum(answer["bytes"] for answer in found)
        outcome.records.append(Record(LINK, "limit", route, size, seconds, "warm", False, None, None, _ranks(devices)))
        say(f"{LINK}, {route}: {outcome.records[-1].gb_per_s:.2f} GB/s")
    return outcome


@contextlib.contextmanager
def _sets(directory: Path, settings: Settings, say: Say) -> Iterator[list[Files]]:
    """A file for each rank, of the same bytes: what is read at once must not be the same pages."""
    shape = shape_for(settings.size_gb)
    with contextlib.ExitStack() as stack:
        found = []
        for rank, device in enumerate(settings.devices):
            folder = directory / f"thaw-bench-rank{rank}"
            folder.mkdir(exist_ok=True)
            if not settings.keep:
                stack.callback(_remove_empty, folder)
            found.append(stack.enter_context(made(folder, shape, device, {THAW}, settings.keep, say)))
        yield found


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _restore(medium: str, files: Sequence[Files], settings: Settings, say: Say) -> Outcome:
    outcome, shape = Outcome(), shape_for(settings.size_gb)
    groups = _alone_and_together(settings)
    rounds: dict[int, list[Round]] = {len(devices): [] for devices in groups}
    work = restore_work(len(settings.devices))
    failed: set[int] = set()
    number = settings.cold_runs if medium == DISK else settings.runs
    for turn in range(number):
        for devices in groups if turn % 2 == 0 else groups[::-1]:
            count = len(devices)
            if count in failed:
                continue
            route = _route(MEDIUM[medium], count)
            entries = [_entry(device, shape, own) for device, own in zip(devices, files, strict=False)]
            try:
                rounds[count].append(
                    together.run(entries, _cold if medium == DISK else _warm, [one.folder for one in files])
                )
            except ChildError as error:
                outcome.missed.append(Missed(work, "thaw", route, str(error)))
                failed.add(count)
                say(f"{work}, {route}: {error}")
                continue
            say(f"{work}, round {turn + 1} of {number}, {route}: {rounds[count][-1].seconds:.3f} s")
    for devices in groups:
        if rounds[len(devices)]:
            outcome.records.append(_record(medium, devices, files, rounds[len(devices)], settings))
    return outcome


def _entry(device: str, shape: Shape, files: Files) -> Entry:
    paths = files.paths[THAW]
    request = {
        "system": "thaw",
        "device": device,
        "shape": asdict(shape),
        "paths": [str(path) for path in paths],
        "digests": files.digests,
        "verify": True,
    }
    return Entry("thaw", device, "restore", request, tuple(paths))


def _warm(entry: Entry) -> float:
    return _in_state(entry, residency.fill(entry.files), lambda share: share >= residency.WARM, "kept in memory")


def _cold(entry: Entry) -> float:
    return _in_state(entry, residency.drop(entry.files), lambda share: share <= residency.COLD, "made cold")


def _in_state(entry: Entry, share: float, good: Callable[[float], bool], what: str) -> float:
    if not good(share):
        raise ChildError(f"the files of {entry.label} could not be {what}: {share:.1%} of them are in memory")
    return share


def _record(
    medium: str, devices: Sequence[str], files: Sequence[Files], rounds: Sequence[Round], settings: Settings
) -> Record:
    last = rounds[-1].answers
    different = next((a["different"] for one in rounds for a in one.answers if a["different"]), None)
    peaks = [one.process_mib for one in rounds if one.process_mib is not None]
    extra: dict[str, Any] = _ranks(devices) | {
        "medium": MEDIUM[medium],
        "directory": str(files[0].folder.parent.parent),
        "residency": [round(one.residency or 0.0, 4) for one in rounds],
        "machine_mib": max(one.machine_mib for one in rounds),
        "rank_seconds": [[round(answer["seconds"], 4) for answer in one.answers] for one in rounds],
        "way": last[0]["route"],
    }
    if different is not None:
        extra["different"] = different
    return Record(
        restore_work(len(settings.devices)),
        "thaw",
        _route(MEDIUM[medium], len(devices)),
        sum(one.bytes for one, _ in zip(files, devices, strict=False)),
        [one.seconds for one in rounds],
        "cold" if medium == DISK else "warm",
        True,
        different is None,
        round(max(peaks), 1) if peaks else None,
        extra,
        file_system_of(files[0].folder),
    )


def _route(way: str, count: int) -> str:
    return f"{way}, {count} rank{'s' if count > 1 else ''}"


def _ranks(devices: Sequence[str]) -> dict[str, Any]:
    return {"ranks": len(devices), "devices": list(devices)}


def growth(outcome: Outcome) -> dict[str, float]:
    """By medium (or ``h2d``), how many times the speed of one rank all of them had together."""
    found: dict[str, dict[int, Record]] = {}
    for record in outcome.records:
        key = record.work if record.work == LINK else str(record.extra.get("medium"))
        found.setdefault(key, {})[record.extra["ranks"]] = record
    return {key: by[max(by)].gb_per_s / by[1].gb_per_s for key, by in found.items() if 1 in by and max(by) > 1}


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """For a person."""
    lines: list[tuple[str, ...]] = [("", "GB", "SECONDS", "LOW", "HIGH", "GB/S", "× ONE", "MIB A RANK", "EQUAL")]
    grown = growth(outcome)
    for record in outcome.records:
        key = record.work if record.work == LINK else str(record.extra.get("medium"))
        times = (f"{t:.3f}" for t in (record.median, min(record.seconds), max(record.seconds)))
        ratio = f"{grown[key]:.2f}" if key in grown and record.extra["ranks"] > 1 else ""
        peak = "" if record.peak_host_mib is None else f"{record.peak_host_mib:.0f}"
        equal = {True: "yes", False: "NO", None: ""}[record.equal]
        name = f"{record.work}: {record.route}"
        lines.append((name, f"{record.bytes / 1e9:.2f}", *times, f"{record.gb_per_s:.2f}", ratio, peak, equal))
    return lines


def devices(names: Sequence[str] | None, count: int | None, visible: int) -> tuple[str, ...]:
    """One for each rank: those that are named, or the first ``count`` of the visible GPUs, or all of them.

    Raises:
        ValueError: there are not so many; the message says what there is.
    """
    if names:
        return tuple(names)
    wanted = count or visible
    if not wanted:
        raise ValueError("torch finds no GPU here; --device cpu --device cpu tries it without")
    if wanted > visible:
        raise ValueError(f"torch finds {visible} GPUs here, not {wanted}; give a smaller --gpus")
    return tuple(f"cuda:{number}" for number in range(wanted))
