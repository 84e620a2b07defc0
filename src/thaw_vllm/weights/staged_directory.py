"""A directory that appears whole or not at all: filled under a hidden name beside its target, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..errors import ExistsError, SpaceError, StorageError, UsageError
from ..transport.writer import StagedFile, sync_directory


class StagedDirectory:
    """A directory being filled; the target is untouched until ``publish``.

    A context manager: leaving it without ``publish`` (also by Ctrl-C) removes what was written. A process that is
    killed leaves a hidden directory behind that nothing reads; the next writer of the same target removes it.

    Args:
        target: the final path; its parent must exist. An empty directory may be there already.
        size: bytes that will be written, checked against the free space.
        force: replace a directory that holds files, if ``ours`` knows every one of them.
        ours: whether a base name is one that this kind of directory has.

    Raises:
        ExistsError, SpaceError, StorageError, UsageError.
    """

    def __init__(
        self, target: str | os.PathLike[str], size: int, *, force: bool = False, ours: Callable[[str], bool]
    ) -> None:
        self.target = Path(target).resolve()
        self._ours, self._force = ours, force
        check_directory(target, force, ours)
        self._remove_stale()
        free = shutil.disk_usage(self.target.parent).free
        if free < size:
            raise SpaceError(
                f"{str(self.target.parent)!r} has {free / 1e9:.2f} GB free, {self.target.name!r} needs "
                f"{size / 1e9:.2f} GB; make room or choose another place"
            )
        self.path = self._hidden()
        self._fd = -1
        self._files: list[StagedFile] = []
        try:
            os.mkdir(self.path)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # network file systems may lack locks
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._mode = os.fstat(self._fd).st_mode & 0o666  # what the user's umask leaves
        except OSError as error:
            self.discard()
            raise StorageError(f"cannot write {str(self.target)!r}: {error.strerror}") from None
        except BaseException:
            self.discard()
            raise

    def file(self, name: str, size: int) -> StagedFile:
        """A new file of ``size`` bytes in the directory, to be written; ``publish`` closes it."""
        staged = StagedFile(self.path / name, size, mode=self._mode)
        self._files.append(staged)
        return staged

    def publish(self) -> None:
        """Sync every file, give the directory its name, then remove the one that was there."""
        for staged in self._files:
            staged.publish()
        check_directory(self.target, self._force, self._ours)
        old: Path | None = None
        try:
            if self.target.is_dir() and os.listdir(self.target):
                old = self._hidden()
                os.rename(self.target, old)
            os.rename(self.path, self.target)
        except BaseException as error:
            if old is not None and not os.path.lexists(self.target):
                os.rename(old, self.target)
            if not isinstance(error, OSError):
                raise
            raise StorageError(
                f"cannot put {str(self.target)!r} in place: {error.strerror}; what was there before is untouched"
            ) from None
        sync_directory(self.target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the hidden directory if it is still there; a second call does nothing."""
        for staged in self._files:
            staged.discard()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> StagedDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.discard()
        if isinstance(value, StorageError) and str(self.path) in str(value):
            raise type(value)(str(value).replace(str(self.path), str(self.target))) from None

    def _hidden(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.thaw-part")

    def _remove_stale(self) -> None:
        for path in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.thaw-part"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)


def check_directory(target: str | os.PathLike[str], force: bool, ours: Callable[[str], bool]) -> None:
    """Refuse a target that cannot be written, or whose replacement would lose a file that is not ``ours``."""
    shown, path = repr(os.fspath(target)), Path(target).resolve()
    if path.is_dir():
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        if entries and not force:
            raise ExistsError(f"{shown} exists and is not empty; use --force (force=True) to replace it")
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) or not ours(entry.name):
                raise UsageError(
                    f"{shown} holds {entry.name!r}, which would be lost; replace it by hand or name another directory"
                )
    elif os.path.lexists(path):
        raise UsageError(f"{shown} is a file; name a directory")
    if not path.parent.is_dir():
        raise StorageError(f"the directory {str(path.parent)!r} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"the directory {str(path.parent)!r} is not writable")
