"""A file of caches, put where engines and compilers look."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import SpaceError, StorageError
from ..transport.writer import FULL
from .archive import Caches, Member
from .groups import absolute, is_list
from .places import Place
from .staging import Staging, remove_stale

THREADS = 4
"""That decompress and write: each file is synced. More are not faster."""


Done = TypeVar("Done")


@dataclass(frozen=True)
class Unpacked:
    """What came of it.

    Attributes:
        written: files.
        present: files that were there already, and were left as they were.
        bytes: of those written.
        unwanted: files of places that nobody has here.
    """

    written: int
    present: int
    bytes: int
    unwanted: int


def unpack(caches: Caches, places: Mapping[str, Place]) -> Unpacked:
    """Put its files where they are looked for. What is there already stays; what is damaged is not published.

    All are verified before any is written, and written before any is published. Each appears whole or not at all. What
    an interruption leaves is what any start may find: some of them.

    Raises:
        SpaceError, StorageError: a place is full, may not be written to, or others may write to it.
        CorruptionError: a member is damaged; nothing was written.
    """
    known = [(m, place) for m in caches.manifest.members if (place := places.get(m.path.partition("/")[0]))]
    missing = [(m, place.directory) for m, place in known if not os.path.lexists(_target(m, place.directory))]

    def verify(number: int) -> None:
        caches.read(missing[number][0])

    _on_threads(verify, len(missing))
    directories = {directory for _, directory in missing}
    for directory in directories:
        _check_place(directory, sum(member.size for member, _ in missing), caches.shown)
    for directory in {place.directory for _, place in known}:
        remove_stale(directory)
    with contextlib.ExitStack() as stack:
        staging = {directory: stack.enter_context(_staging(directory)) for directory in directories}
        sizes = _write(caches, missing, staging)
        written = 0
        for number in sorted(range(len(missing)), key=lambda number: is_list(missing[number][0].path)):
            member, directory = missing[number]  # Triton takes a kernel for complete whose list is there
            if _publish(staging[directory], str(number), _target(member, directory), directory):
                written += 1
            else:
                sizes[number] = 0
        for stage in staging.values():
            stage.sync()
    every = len(caches.manifest.members)
    return Unpacked(written, len(known) - written, sum(sizes), every - len(known))


def _write(caches: Caches, missing: Sequence[tuple[Member, Path]], staging: Mapping[Path, Staging]) -> list[int]:
    """Write members, each named by its number; what each has in bytes."""

    def bring(number: int) -> int:
        member, directory = missing[number]
        target = _target(member, directory)
        data = absolute(member.path, caches.read(member), target.parent)
        try:
            staging[directory].write(str(number), data)
        except OSError as error:
            raise _refused(error, target) from None
        return len(data)

    return _on_threads(bring, len(missing))


def _on_threads(work: Callable[[int], Done], count: int) -> list[Done]:
    """What it does for each number below ``count``; the first failure ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        wanted = [pool.submit(work, number) for number in range(count)]
        try:
            return [one.result() for one in wanted]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _staging(directory: Path) -> Staging:
    try:
        return Staging(directory)
    except OSError as error:
        raise _refused(error, directory) from None


def _refused(error: OSError, path: Path) -> StorageError:
    kind = SpaceError if error.errno in FULL else StorageError
    return kind(f"{str(path)!r} cannot be written: {error.strerror or error}")


def _target(member: Member, directory: Path) -> Path:
    return directory / member.path.partition("/")[2]


def _check_place(directory: Path, size: int, shown: str) -> None:
    try:
        _make(directory)
        found = directory.stat()
        room = os.statvfs(directory)
    except OSError as error:
        raise StorageError(f"nothing can be kept in {str(directory)!r}: {error.strerror or error}") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise StorageError(
            f"others may write to {str(directory)!r}; chmod 700 it, or have another directory in its place"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise StorageError(f"{str(directory)!r} may not be written to")
    if room.f_bavail * room.f_frsize < size:
        raise SpaceError(
            f"{str(directory)!r} has {room.f_bavail * room.f_frsize / 1e9:.2f} GB free, {shown} needs "
            f"{size / 1e9:.2f}; make room"
        )


def _publish(stage: Staging, name: str, target: Path, place: Path) -> bool:
    """Whether it got its name, and was not brought by another start meanwhile."""
    try:
        if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(place)):
            raise StorageError(f"{str(target.parent)!r} leads out of {str(place)!r}")
        _make(target.parent)
        return stage.publish(name, target)
    except OSError as error:
        raise _refused(error, target) from None


def _make(directory: Path) -> None:
    """Make a directory, and those above it that are not there, for its owner alone, whatever the umask is."""
    if not directory.is_dir():
        _make(directory.parent)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            if not directory.is_dir():
                raise
