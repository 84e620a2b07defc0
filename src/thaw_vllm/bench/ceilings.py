"""The parent's side of ``limits``: which limit can be measured where, each in a fresh process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..transport.medium import IN_MEMORY
from .files import check_room
from .outcome import Missed, Outcome, Say
from .process import ChildError, ask
from .record import Record, file_system_of

LINK, DISK, MEMORY = ("h2d", "d2h"), ("disk-write", "disk-read"), ("tmpfs-write", "memory-read")
WORKS = LINK + DISK + MEMORY
WRITE_ROUTES = ("pwrite", "mapping")


@dataclass(frozen=True)
class Settings:
    """How limits are measured.

    Attributes:
        device: ``cpu``, or ``cuda`` with or without a number.
        size: bytes moved in a run.
        runs: that are counted.
        threads: of disk and memory works.
    """

    device: str
    size: int
    runs: int
    threads: int


def measure(works: Sequence[str], directories: Sequence[Path], settings: Settings, say: Say) -> Outcome:
    """Every work of ``works``, the disk's and memory's in every directory where they make sense.

    Raises:
        SpaceError: no room for a file of ``settings.size``.
    """
    outcome = Outcome()
    for work in works:
        if work in LINK:
            outcome += link(work, settings, say)
    for directory in directories:
        in_memory = on_memory(directory)
        if set(works) & {*DISK, *MEMORY}:
            check_room(directory, int(1.05 * settings.size), "give a smaller --size-gb or another --dir")
        with scratch(directory) as path:
            for work in works:
                if work in DISK and in_memory:
                    outcome.missed.append(Missed(work, "limit", "", f"{str(directory)!r} is memory, not a disk"))
                elif work == "tmpfs-write" and in_memory:
                    for route in WRITE_ROUTES:
                        outcome += one(work, path, settings, say, route=route)
                elif work == "memory-read" or work in DISK:
                    outcome += one(work, path, settings, say)
    return outcome


def link(work: str, settings: Settings, say: Say) -> Outcome:
    """``h2d`` or ``d2h``."""
    if settings.device == "cpu":
        return Outcome(missed=[Missed(work, "limit", "", "needs a GPU; torch finds none, or --device cpu was given")])
    return one(work, None, settings, say)


def one(work: str, path: Path | None, settings: Settings, say: Say, **more: Any) -> Outcome:
    """One limit, or the line that says why there is none."""
    request = {"device": settings.device, "bytes": settings.size, "runs": settings.runs, "threads": settings.threads}
    try:
        answer = ask(work, request | {"path": None if path is None else str(path)} | more)
    except ChildError as error:
        say(f"{work}: {error}")
        return Outcome(missed=[Missed(work, "limit", more.get("route", ""), str(error))])
    extra: dict[str, Any] = {"threads": answer["threads"]}
    if path is not None:
        extra["directory"] = str(path.parent)
    record = Record(
        work,
        "limit",
        answer["route"],
        answer["bytes"],
        answer["seconds"],
        "cold" if work == "disk-read" else "warm",
        False,
        None,
        None,
        extra,
        "" if path is None else file_system_of(path.parent),
    )
    say(f"{work}, {record.route}: {record.gb_per_s:.2f} GB/s")
    return Outcome([record])


def on_memory(directory: Path) -> bool:
    """Whether files there are memory."""
    return file_system_of(directory) in IN_MEMORY


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A name for a file there; whatever is under it is removed afterwards."""
    import secrets

    path = directory / f"thaw-bench-{secrets.token_hex(4)}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
