"""Snapshots that starts keep by themselves: their directory, its budget, and locks that say which are in use.

A snapshot's name is a key, a digest of everything that makes it valid. ``KEY.thaw`` is the file (the manifest of a
set), ``KEY.lock`` beside it says who uses it: an engine that was filled from it holds it shared for as long as it
lives, whoever writes or removes it holds it alone. Its time of modification is that of the last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StorageError, ThawError, UsageError
from ..format.header import Header
from ..transport.private import private as made_private
from ..transport.writer import remove_stale
from .checkpoint import Checkpoint, open_checkpoint
from .open import open_snapshot
from .provenance import cache_directory
from .rank_names import LABEL

GB_VARIABLE = "THAW_CACHE_GB"
SHARE, RESERVE = 5, 10
"""Where nobody says how large the cache may be: a fifth of its file system, a tenth of which stays free."""
KEY_DIGITS = 24
ORIGIN = "cached"
"""Key in the header's source: what the snapshot was made from, for ``stale``."""

_MOMENT = 0.3
_NAME = re.compile(rf"([0-9a-f]{{{KEY_DIGITS}}})(\.thaw|\.lock|(?:\.[0-9a-f]{{12}})?\.{LABEL}\.thaw)")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def snapshots_directory(chosen: str | os.PathLike[str] | None = None) -> Path:
    """Where snapshots are kept: ``snapshots`` in the directory of ``--cache-dir``, else in thaw's cache directory."""
    base = cache_directory() if chosen is None else Path(chosen).expanduser()
    return Path(os.path.abspath(base)) / "snapshots"


def private(directory: Path) -> None:
    """``transport.private.private`` for this cache.

    Raises:
        StorageError: as that.
    """
    made_private(directory, "choose another with --cache-dir")


def limit(gigabytes: object, option: str = "--cache-gb", variable: str = GB_VARIABLE) -> int | None:
    """Bytes of an option, or of a variable, which counts where the former is None; None: nobody said.

    Raises:
        UsageError: it is no number from 0.
    """
    given = os.environ.get(variable) or None if gigabytes is None else gigabytes
    if given is None:
        return None
    try:
        found = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise UsageError(f"{option} (or {variable}) must be a number of gigabytes from 0, not {given!r}")
    return int(found * 1e9)


class Lock:
    """The lock of one key's files; taken without waiting, and let go of by ``release`` or with the process.

    Another process, or another ``Lock`` of this one, that holds it alone keeps everybody out; many may share it.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.path = directory / f"{key}.lock"
        self._fd = -1

    def share(self) -> bool:
        """Whether it is held now, with others. Tried for a moment, in which somebody may look whether it is free."""
        return self._soon(fcntl.LOCK_SH)

    def alone(self, *, soon: bool = False) -> bool:
        """Whether it is held now, by nobody else. Where not, it is not held at all.

        Args:
            soon: try for a moment, too.
        """
        return self._soon(fcntl.LOCK_EX) if soon else self._take(fcntl.LOCK_EX)

    def _soon(self, how: int) -> bool:
        until = time.monotonic() + _MOMENT
        while not self._take(how):
            if time.monotonic() > until:
                return False
            time.sleep(_MOMENT / 10)
        return True

    def _take(self, how: int) -> bool:
        """Raises:
        StorageError: this file system has no locks, or the file cannot be made.
        """
        while True:
            try:
                if self._fd < 0:
                    self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                fcntl.flock(self._fd, how | fcntl.LOCK_NB)
                if self._is_the_file():
                    return True
            except BlockingIOError:
                self.release()
                return False
            except OSError as error:
                self.release()
                raise StorageError(f"{str(self.path)!r} cannot be locked: {error.strerror or error}") from None
            self.release()  # whoever held it has removed it meanwhile

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def used(self) -> None:
        """Note the time."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let go of it; again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.release()


def lock_of(path: str | os.PathLike[str]) -> Lock | None:
    """The lock of a snapshot in the cache; None of any other file."""
    place = Path(path)
    named = _NAME.fullmatch(place.name)
    if named is None or named[2] != ".thaw" or not place.with_suffix(".lock").is_file():
        return None
    return Lock(place.parent, named[1])


@dataclass(frozen=True)
class Entry:
    """The files of one key.

    Attributes:
        path: the snapshot, the manifest of a set; there may be none, where a freeze was killed.
        names: of all its files but the lock.
        bytes: of them.
        made: when the snapshot was published; None where there is none.
        used: when an engine was last filled from it, or it was made.
    """

    key: str
    path: Path
    names: tuple[str, ...]
    bytes: int
    made: float | None
    used: float


def entries(directory: Path) -> list[Entry]:
    """Every key's files, the one used longest ago first; nothing where there is no such directory.

    Raises:
        StorageError: it cannot be read.
    """
    found: dict[str, dict[str, os.stat_result]] = {}
    try:
        with os.scandir(directory) as scanned:
            for entry in scanned:
                named = _NAME.fullmatch(entry.name)
                if named and (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        found.setdefault(named[1], {})[entry.name] = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{str(directory)!r} cannot be read: {error.strerror}") from None
    return sorted((_entry(directory, key, files) for key, files in found.items()), key=lambda one: one.used)


def _entry(directory: Path, key: str, files: dict[str, os.stat_result]) -> Entry:
    path = directory / f"{key}.thaw"
    lock, own = files.pop(f"{key}.lock", None), files.get(path.name)
    times = [status.st_mtime for status in (lock, own) if status is not None]
    size = sum(status.st_size for status in files.values() if stat.S_ISREG(status.st_mode))
    return Entry(key, path, tuple(sorted(files)), size, None if own is None else own.st_mtime, max(times, default=0.0))


def in_use(entry: Entry) -> bool:
    """Whether an engine was filled from it, or it is being written."""
    try:
        fd = os.open(entry.path.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def discard(entry: Entry, *, lock: bool = True) -> None:
    """Remove a key's files, the manifest first; whoever calls holds its lock alone.

    Args:
        lock: remove that, too.

    Raises:
        StorageError: one cannot be removed.
    """
    names = [entry.path.name, *(name for name in entry.names if name != entry.path.name)]
    names += [f"{entry.key}.lock"] if lock else []
    for name in names:
        try:
            (entry.path.parent / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{name!r} cannot be removed: {error.strerror}") from None


def discard_unused(entry: Entry) -> bool:
    """Remove a key's files unless an engine uses them; whether they are gone.

    Raises:
        StorageError: they cannot be locked or removed.
    """
    lock = Lock(entry.path.parent, entry.key)
    try:
        if not lock.alone():
            return False
        discard(entry)
        return True
    finally:
        lock.release()


def make_room(
    directory: Path, key: str, need: int, most: int | None, first: Callable[[Entry], bool] = lambda _: False
) -> str | None:
    """Remove what killed freezes left and what was used longest ago until ``need`` bytes fit; or say why they do not.

    Nothing is removed where that would not help, and nothing that an engine uses.

    Args:
        key: whose files these will be; its old ones are the caller's.
        most: bytes that all snapshots there may take; None for what SHARE and RESERVE say.
        first: which to remove before all others.

    Raises:
        StorageError: the directory cannot be read, or something not be removed.
    """
    remove_stale(directory, "*")
    status = os.statvfs(directory)
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    cap, reserve = (total // SHARE, total // RESERVE) if most is None else (most, 0)
    if need > cap:
        whose = f"a fifth of its file system ({total / 1e9:.1f} GB)" if most is None else "as you chose"
        return f"the cache may hold {cap / 1e9:.2f} GB, {whose}; --cache-gb (or {GB_VARIABLE}) says otherwise"
    others = [entry for entry in entries(directory) if entry.key != key]
    wanted = max(sum(entry.bytes for entry in others) + need - cap, need + reserve - free)
    others.sort(key=lambda entry: (entry.made is not None, wanted > 0 and not first(entry)))
    with contextlib.ExitStack() as stack:
        chosen: list[Entry] = []
        for entry in others:
            if sum(one.bytes for one in chosen) >= wanted and entry.made is not None:
                break
            lock = Lock(directory, entry.key)
            stack.callback(lock.release)
            if lock.alone():
                chosen.append(entry)
        if wanted > sum(one.bytes for one in chosen):
            if need + reserve - free > sum(one.bytes for one in chosen):
                kept = f", of which {reserve / 1e9:.1f} are left free" if reserve else ""
                return (
                    f"{str(directory)!r} has {free / 1e9:.1f} GB free{kept}; make room, or choose another --cache-dir"
                )
            return f"the cache is full of snapshots that engines use; --cache-gb (or {GB_VARIABLE}) makes it larger"
        for entry in chosen:
            discard(entry)
    return None


def stamp(checkpoint: Checkpoint) -> list[list[Any]]:
    """Of each weight file what changes with its content: name, size, and time of modification.

    A file of the hub's cache is a link to a blob that is named for its content: that name stands for the time.
    """
    found: list[list[Any]] = []
    for name, size, modified, *_ in checkpoint.stamp:
        path = checkpoint.directory / name
        target = Path(os.readlink(path)) if path.is_symlink() else Path()
        blob = target.parent.name == "blobs" and _BLOB.fullmatch(target.name) is not None
        found.append([name, size, target.name if blob else str(modified)])
    return found


def origin_of(header: Header) -> dict[str, Any]:
    """What a cached snapshot says it was made from; empty where it says nothing."""
    found = header.source.get(ORIGIN)
    return found if isinstance(found, dict) else {}


def stale(header: Header) -> str | None:
    """Why no start will use a cached snapshot any more; None while its checkpoint is as it was."""
    origin = origin_of(header)
    directory = origin.get("directory")
    if not isinstance(directory, str):
        return "it does not say what it was made from"
    if not os.path.isdir(directory):
        return "the model directory is gone"
    try:
        now = stamp(open_checkpoint(directory))
    except (ThawError, OSError):
        return "the model's weight files are gone, or damaged"
    return None if now == origin.get("files") else "the model's weight files have changed"


def headers(found: Collection[Entry]) -> Iterator[tuple[Entry, Header | ThawError]]:
    """Each with its header, or with what is wrong with the file."""
    for entry in found:
        if entry.made is None:
            yield entry, StorageError("a freeze has left it unfinished")
            continue
        try:
            with open_snapshot(entry.path, with_chunks=False) as opened:
                yield entry, opened.snapshot.header
        except ThawError as error:
            yield entry, error
