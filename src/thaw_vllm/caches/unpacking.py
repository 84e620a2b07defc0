"""A file of caches, put where engines and compilers look."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExistsError, SpaceError, StorageError
from ..transport.writer import StagedFile
from .archive import Caches, Member
from .groups import absolute, is_list
from .places import Place

THREADS = 8
"""That decompress and write: each file is synced."""


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

    All are verified before any is written. Each appears whole or not at all. What an interruption leaves is what any
    start may find: some of them.

    Raises:
        SpaceError, StorageError: a place is full, may not be written to, or others may write to it.
        CorruptionError: a member is damaged; nothing was written.
    """
    known = [(m, place) for m in caches.manifest.members if (place := places.get(m.path.partition("/")[0]))]
    missing = [(m, place) for m, place in known if not os.path.lexists(_target(m, place))]

    def verify(member: Member) -> None:
        caches.read(member)

    def bring(member: Member, place: Place) -> int | None:
        target = _target(member, place)
        data = absolute(member.path, caches.read(member), target.parent)
        return len(data) if _publish(target, data, place.directory) else None

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(verify, member) for member, _ in missing]:
            done.result()
        for directory in {place.directory for _, place in missing}:
            _check_place(directory, sum(member.size for member, _ in missing), caches.shown)
        sizes: list[int | None] = []
        for lists in (False, True):  # Triton takes a kernel for complete whose list is there
            wanted = [pool.submit(bring, m, place) for m, place in missing if is_list(m.path) == lists]
            try:
                sizes += [one.result() for one in wanted]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    written = [size for size in sizes if size is not None]
    every = len(caches.manifest.members)
    return Unpacked(len(written), len(known) - len(written), sum(written), every - len(known))


def _target(member: Member, place: Place) -> Path:
    return place.directory / member.path.partition("/")[2]


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


def _publish(target: Path, data: bytes, place: Path) -> bool:
    """Whether it was written, and not brought by another start meanwhile."""
    try:
        if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(place)):
            raise StorageError(f"{str(target.parent)!r} leads out of {str(place)!r}")
        _make(target.parent)
        with StagedFile(target, len(data)) as staged:
            staged.write(0, data)
            staged.publish()
    except ExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{str(target)!r} cannot be written: {error.strerror or error}") from None
    return True


def _make(directory: Path) -> None:
    """Make a directory, and those above it that are not there, for its owner alone, whatever the umask is."""
    if not directory.is_dir():
        _make(directory.parent)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            if not directory.is_dir():
                raise
