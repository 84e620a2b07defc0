"""``thaw bench multi-gpu``: a set's ranks restored at once, each to its own GPU; and one GPU's weights to others."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import ceilings, over_tcp, together
from .files import Files
from .llama import Shape, shape_for
from .outcome import Missed, Outcome, Say
from .process import PREPARED, READY, STARTING, Child, ChildError, ask
from .record import Record, file_system_of
from .rounds import Entry
from .summary import alone
from .systems import THAW
from .together import Round
from .weights import DISK, MEDIUM, PAGECACHE, TMPFS, applies, cold, made, warm

LINK, RESTORE, PEER, TCP, BROADCAST = "h2d", "restore", "peer", over_tcp.WORK, "broadcast"
WORKS = (LINK, RESTORE, PEER, TCP, BROADCAST)
COPY = "d2d"


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
        others = [work for work in (PEER, TCP, BROADCAST) if work in settings.works]
        for directory in settings.directories if RESTORE in settings.works else settings.directories[:1]:
            if RESTORE not in settings.works and not others:
                break
            with _sets(directory, settings, say) as files:
                for medium in (TMPFS, PAGECACHE, DISK):
                    if RESTORE in settings.works and applies(medium, directory):
                        outcome += _restore(medium, files, settings, say)
                for work in others:
                    measured = {PEER: _peers, TCP: _over_tcp, BROADCAST: _broadcast}[work]
                    outcome += measured(files[0], settings, say)
                others = []  # nothing of it is read from the directory, but by the first rank
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
                    together.run(entries, cold if medium == DISK else warm, [one.folder for one in files])
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


def _peers(files: Files, settings: Settings, say: Say) -> Outcome:
    """A rank's weights, from the process that has them on the first GPU, to the next one and to another of its own."""
    outcome, shape, devices = Outcome(), asdict(shape_for(settings.size_gb)), settings.devices
    path = str(files.paths[THAW][0])
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        request = {"device": devices[0], "path": path, "shape": shape, "digests": files.digests}
        request |= {"place": f"{folder}/state/offers"}
        try:
            with Child("lend", request) as lender:
                lender.reach(READY, STARTING)
                lender.go()
                lender.reach(PREPARED)
                for to in dict.fromkeys([devices[-1], devices[0]]):
                    outcome += _plain_copy(devices[0], to, settings, say)
                    entry = Entry("thaw", to, "borrow", request | {"device": to})
                    work, route = _peer(devices[0], to), f"{devices[0]} → {to}"
                    outcome += _repeated(work, [entry], route, files, settings, say)
        except ChildError as error:
            outcome.missed.append(Missed(PEER, "thaw", "", str(error)))
            say(f"{PEER}: {error}")
    return outcome


def _over_tcp(files: Files, settings: Settings, say: Say) -> Outcome:
    path, shape = str(files.paths[THAW][0]), asdict(shape_for(settings.size_gb))
    return over_tcp.measure(
        settings.devices,
        {"path": path, "shape": shape, "digests": files.digests},
        settings.limits,
        lambda entry, route: _repeated(TCP, [entry], route, files, settings, say),
        say,
    )


def _peer(lender: str, to: str) -> str:
    """What it is called."""
    return "peer-cpu" if to == "cpu" else "peer-ipc" if to == lender else "peer-nvlink"


def _plain_copy(source: str, to: str, settings: Settings, say: Say) -> Outcome:
    if to == "cpu":
        return Outcome()
    route = f"{source} → {to}"
    try:
        found = ask(COPY, {"device": source, "to": to, "bytes": settings.limits.size, "runs": settings.limits.runs})
    except ChildError as error:
        say(f"{COPY}, {route}: {error}")
        return Outcome(missed=[Missed(COPY, "limit", route, str(error))])
    record = Record(COPY, "limit", route, found["bytes"], found["seconds"], "warm", False, None, None, {"ranks": 1})
    say(f"{COPY}, {route}: {record.gb_per_s:.2f} GB/s")
    return Outcome([record])


def _broadcast(files: Files, settings: Settings, say: Say) -> Outcome:
    """One file read by the first rank, for it alone and for all."""
    outcome, devices = Outcome(), settings.devices
    alone = _entry(devices[0], shape_for(settings.size_gb), files)
    expected = "thaw" if devices[0] == "cpu" else "thaw-expected"  # as the first of several is
    alone = replace(alone, request=alone.request | {"system": expected})
    outcome += _repeated(BROADCAST, [alone], _route("one read", 1), files, settings, say)
    if len(devices) < 2:
        return outcome
    with tempfile.TemporaryDirectory(prefix="thaw-") as place:
        numbers = iter(range(settings.runs))

        def entries() -> list[Entry]:
            own = alone.request | {"path": str(files.paths[THAW][0]), "ranks": len(devices)}
            own |= {"rendezvous": f"{place}/{next(numbers)}"}
            return [
                Entry("thaw", device, BROADCAST, own | {"device": device, "rank": rank}, alone.files)
                for rank, device in enumerate(devices)
            ]

        outcome += _repeated(BROADCAST, entries, _route("one read", len(devices)), files, settings, say)
    return outcome


def _repeated(
    work: str,
    entries: Sequence[Entry] | Callable[[], Sequence[Entry]],
    route: str,
    files: Files,
    settings: Settings,
    say: Say,
) -> Outcome:
    """Fresh processes, as often as is asked for, in one record: of the slowest of them each time."""
    rounds: list[Round] = []
    count = 1
    for turn in range(settings.runs):
        here = entries() if callable(entries) else entries
        count = len(here)
        try:
            rounds.append(together.run(here, lambda entry: warm(entry) if entry.files else None, [files.folder]))
        except ChildError as error:
            say(f"{work}, {route}: {error}")
            return Outcome(missed=[Missed(work, "thaw", route, str(error))])
        slowest = max(answer["seconds"] for answer in rounds[-1].answers)
        say(f"{work}, round {turn + 1} of {settings.runs}, {route}: {slowest:.3f} s")
    first = rounds[0].answers[0]
    extra = {"ranks": count, "way": first["route"], "phases": first["phases"]} | _difference(rounds)
    seconds = [max(answer["seconds"] for answer in one.answers) for one in rounds]
    equal = "different" not in extra
    return Outcome([Record(work, "thaw", route, files.bytes, seconds, "warm", True, equal, _peak(rounds), extra)])


def _difference(rounds: Sequence[Round]) -> dict[str, Any]:
    """``different``, the first tensor that was not as in the source; empty where there is none."""
    found = next((answer["different"] for one in rounds for answer in one.answers if answer["different"]), None)
    return {} if found is None else {"different": found}


def _peak(rounds: Sequence[Round]) -> float | None:
    peaks = [one.process_mib for one in rounds if one.process_mib is not None]
    return round(max(peaks), 1) if peaks else None


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


def _record(
    medium: str, devices: Sequence[str], files: Sequence[Files], rounds: Sequence[Round], settings: Settings
) -> Record:
    last = rounds[-1].answers
    extra = (
        _ranks(devices)
        | {
            "medium": MEDIUM[medium],
            "directory": str(files[0].folder.parent.parent),
            "residency": [round(one.residency or 0.0, 4) for one in rounds],
            "machine_mib": max(one.machine_mib for one in rounds),
            "rank_seconds": [[round(answer["seconds"], 4) for answer in one.answers] for one in rounds],
            "way": last[0]["route"],
        }
        | _difference(rounds)
    )
    return Record(
        restore_work(len(settings.devices)),
        "thaw",
        _route(MEDIUM[medium], len(devices)),
        sum(one.bytes for one, _ in zip(files, devices, strict=False)),
        [one.seconds for one in rounds],
        "cold" if medium == DISK else "warm",
        True,
        "different" not in extra,
        _peak(rounds),
        extra,
        file_system_of(files[0].folder),
    )


def _route(way: str, count: int) -> str:
    return f"{way}, {count} rank{'s' if count > 1 else ''}"


def _ranks(devices: Sequence[str]) -> dict[str, Any]:
    return {"ranks": len(devices), "devices": list(devices)}


def growth(outcome: Outcome) -> dict[tuple[str, str], float]:
    """By work and medium, how many times the speed of one rank all of them had together.

    Of a broadcast it is what all have, over what one reads in the same time.
    """
    grown: dict[tuple[str, str], float] = {}
    for record in sorted(outcome.records, key=lambda one: one.extra.get("ranks", 1), reverse=True):
        if (one := alone(record, outcome)) is not None:
            copies = record.extra["ranks"] if record.work == BROADCAST else 1
            grown.setdefault(_kind(record), copies * record.gb_per_s / one.gb_per_s)
    return grown


def _kind(record: Record) -> tuple[str, str]:
    return record.work, str(record.extra.get("medium", ""))


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """For a person."""
    lines: list[tuple[str, ...]] = [("", "GB", "SECONDS", "LOW", "HIGH", "GB/S", "× ONE", "MIB A RANK", "EQUAL")]
    grown = growth(outcome)
    for record in outcome.records:
        times = (f"{t:.3f}" for t in (record.median, min(record.seconds), max(record.seconds)))
        together = _kind(record) in grown and record.extra["ranks"] > 1
        ratio = f"{grown[_kind(record)]:.2f}" if together else ""
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
