"""A file that appears whole or not at all: written under a hidden name beside its target, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType

from ..errors import ExistsError, SpaceError, StorageError, UsageError
from . import bulk
from .bulk import Bulk
from .medium import in_memory

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors that say that there is no room."""

_PART = ".thaw-part"
ANY_TOKEN = "[0-9a-f]" * 8
"""Pattern of what ``secrets.token_hex(4)`` gives, exactly: ``.a.*`` would match the hidden files of ``a.b`` too."""


class StagedFile:
    """A file being written; the target is untouched until ``publish``.

    Use as a context manager: leaving it without ``publish`` (also by Ctrl-C) removes what was written. A process that
    is killed leaves a hidden file behind that nothing reads; the next writer of the same target removes it.

    Args:
        target: the final path; its directory must exist.
        size: bytes to reserve, checked against the free space before anything is written.
        force: replace an existing target.
        mode: permission bits of the published file.

    Raises:
        ExistsError, SpaceError, StorageError, UsageError.
    """

    def __init__(self, target: str | os.PathLike[str], size: int, *, force: bool = False, mode: int = 0o600) -> None:
        self.target = Path(target)
        self.force = force
        self.size = size
        check_target(self.target, force)
        remove_stale(self.target.parent, glob.escape(self.target.name))
        self._place = self.target.absolute()  # the process may change its directory meanwhile
        self.path = self._place
        self._mode, self._fd = mode, -1
        self._bulk: Bulk | None = None
        free = _free_bytes(self.target.parent)
        if free < size:
            raise SpaceError(
                f"{str(self.target.parent)!r} has {free / 1e9:.2f} GB free, {self.target.name!r} needs "
                f"{size / 1e9:.2f} GB; make room or choose another place"
            )
        try:
            self._create()
            self._reserve(size)
        except OSError as error:
            self.discard()
            raise _storage_error(error, self.target) from None
        except BaseException:
            self.discard()
            raise

    def _create(self) -> None:
        while True:
            self.path = self._place.with_name(hidden_name(self.target.name, secrets.token_hex(4)))
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another writer takes it for stale, in the moment before it was locked
                self.discard()
                continue
            except OSError:  # network file systems may lack locks; then nobody removes ours either
                return
            # Or it has done so already.
            if os.path.exists(self.path):
                return
            self.discard()

    def _reserve(self, size: int) -> None:
        try:
            if size >= bulk.LARGE and in_memory(self._fd):
                # Reserving is writing zeros there, by one thread: as long as writing the bytes themselves.
                os.ftruncate(self._fd, size)
            elif size:
                os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno in FULL:
                raise
            os.ftruncate(self._fd, size)

    def write(self, offset: int, view: memoryview | bytes) -> None:
        """Write ``view`` at ``offset``; safe from several threads.

        Raises:
            SpaceError, StorageError.
        """
        view = memoryview(view)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                raise _storage_error(error, self.target) from None

    @property
    def bulk(self) -> Bulk:
        """How ``write_bulk`` writes; chosen when first asked, by one thread."""
        if self._bulk is None:
            self._bulk = bulk.choose(self._fd, self.size)
        return self._bulk

    def write_bulk(self, offset: int, view: memoryview) -> None:
        """``write`` for large pieces, by the fastest way that the medium has; safe from several threads.

        Raises:
            SpaceError, StorageError.
        """
        try:
            self.bulk.write(offset, view)
        except OSError as error:
            raise _storage_error(error, self.target) from None

    def cut(self, size: int) -> None:
        """Make it so long, where less was written than was reserved.

        Raises:
            StorageError.
        """
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _storage_error(error, self.target) from None

    def publish(self) -> None:
        """Sync the bytes, give the file its name, sync the directory."""
        try:
            os.fchmod(self._fd, self._mode)
            os.fsync(self._fd)
            if self.force:
                os.rename(self.path, self._place)
            else:
                link_or_rename(self.path, self._place)
            sync_directory(self._place.parent)
        except FileExistsError:
            raise ExistsError(f"{str(self.target)!r} appeared while it was being written; use force") from None
        except OSError as error:
            raise _storage_error(error, self.target) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Close, and remove the hidden file if it is still there; a second call does nothing."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        if self._bulk is not None:
            self._bulk.close()
        fd, self._fd = self._fd, -1
        os.close(fd)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.discard()


def check_target(target: Path, force: bool) -> None:
    """Refuse a target that cannot be written before any work is done for it."""
    if target.name in ("", ".", "..") or "\0" in target.name:
        raise UsageError(f"{str(target)!r} names no file")
    if not os.path.isdir(target.parent):
        raise StorageError(f"the directory {str(target.parent)!r} does not exist; make it first")
    if os.path.isdir(target):
        raise UsageError(f"{str(target)!r} is a directory; name a file in it")
    if not force and os.path.lexists(target):
        raise ExistsError(f"{str(target)!r} exists; use --force (force=True) to replace it")
    if not os.access(target.parent, os.W_OK):
        raise StorageError(f"the directory {str(target.parent)!r} is not writable")


def remove_stale(directory: Path, names: str) -> list[Path]:
    """Remove hidden files that killed writers left; those of a living writer hold a lock and stay.

    Args:
        directory: where the targets are.
        names: pattern of the targets' names (``glob.escape`` of one).
    """
    removed = []
    for path in staged(directory, names):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                removed.append(path)
            finally:
                os.close(fd)
    return removed


def remove_stale_directories(directory: Path, names: str) -> None:
    """``remove_stale``, of hidden directories."""
    for left in directory.glob(hidden_name(names, ANY_TOKEN)):
        with contextlib.suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; OSError where another writer does, or the file system has none."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def staged(directory: Path, names: str) -> list[Path]:
    """The hidden files of writers, living or killed, whose targets' names match the pattern."""
    try:
        hidden = [name for name in os.listdir(directory) if name.endswith(_PART)]
    except OSError:  # there is none, or nobody may look
        return []
    pattern = hidden_name(names, ANY_TOKEN)  # translated for nothing else: it takes longer than writing 1 MiB
    return sorted(directory / name for name in hidden if fnmatchcase(name, pattern))


def hidden_name(name: str, token: str) -> str:
    """Under which name a writer of ``name`` writes."""
    return f".{name}.{token}{_PART}"


def link_or_rename(source: Path, target: Path) -> None:
    """Give a file its name, but not another one's; on most file systems it keeps the one it had as well.

    Raises:
        FileExistsError: there is one of that name.
        OSError.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError from None
        os.rename(source, target)


def sync_directory(path: Path) -> None:
    """Make renames in ``path`` durable; ignored where directories cannot be opened or synced."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _storage_error(error: OSError, target: Path) -> StorageError:
    if error.errno in FULL:
        return SpaceError(f"no room for {str(target)!r}: {error.strerror}; what was there before is untouched")
    return StorageError(f"cannot write {str(target)!r}: {error.strerror}; what was there before is untouched")
