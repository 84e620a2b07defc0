"""A directory that appears whole or not at all: filled under a hidden name beside its target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..errors import ExistsError, SpaceError, StorageError, UsageError
from ..transport.swap import swap
from ..transport.writer import ANY_TOKEN, StagedFile, hidden_name, locked, remove_stale_directories, sync_directory


class StagedDirectory:
    """A directory being filled; the target is untouched until ``publish``.

    A context manager: leaving it without ``publish`` (also by Ctrl-C) removes what was written. A process that is
    killed leaves a hidden directory behind that nothing reads; the next writer of the same target removes it. Where two
    names cannot be swapped in one step, one that is killed while it publishes may leave the old directory aside, as
    ``.NAME.TOKEN.thaw-old``; the next writer puts it back.

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
        self.target = Path(os.path.realpath(target))
        self._ours, self._force = ours, force
        self._remove_stale()
        check_directory(target, force, ours)
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
            self._create()
            self._mode = os.fstat(self._fd).st_mode & 0o666  # what the user's umask leaves
        except OSError as error:
            self.discard()
            raise StorageError(f"cannot write {str(self.target)!r}: {error.strerror}") from None
        except BaseException:
            self.discard()
            raise

    def _create(self) -> None:
        while True:
            os.mkdir(self.path)
            # Another writer may take it for stale, in the moment before it is locked; then it is made again.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise
                except OSError:  # network file systems may lack locks; then nobody removes ours either
                    return
                if os.path.exists(self.path):
                    return
            self.discard()
            self.path = self._hidden()

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
        try:
            if not self.target.is_dir() or not os.listdir(self.target):
                os.rename(self.path, self.target)
            elif not swap(self.path, self.target):
                self._replace_in_two_steps()
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise ExistsError(f"{str(self.target)!r} appeared while it was being written; run it again") from None
            raise StorageError(
                f"cannot put {str(self.target)!r} in place: {error.strerror}; what was there before is untouched"
            ) from None
        sync_directory(self.target.parent)
        self.discard()  # after a swap, what was there before has our hidden name

    def _replace_in_two_steps(self) -> None:
        old = self.target.with_name(_aside(self.target.name, secrets.token_hex(4)))
        with contextlib.ExitStack() as stack:
            # No other writer may take the old one for stale while it is aside; network file systems may lack locks.
            with contextlib.suppress(OSError):
                stack.enter_context(locked(self.target))
            try:
                os.rename(self.target, old)
                os.rename(self.path, self.target)
                sync_directory(self.target.parent)
            finally:
                self._settle(old)

    def _settle(self, old: Path) -> None:
        """What was moved aside goes where something has taken its place, and comes back where nothing has."""
        if os.path.lexists(self.target):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, self.target)

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
        return self.target.with_name(hidden_name(self.target.name, secrets.token_hex(4)))

    def _remove_stale(self) -> None:
        name = glob.escape(self.target.name)
        for old in self.target.parent.glob(_aside(name, ANY_TOKEN)):
            with contextlib.suppress(OSError), locked(old):
                self._settle(old)
        remove_stale_directories(self.target.parent, name)


def _aside(name: str, token: str) -> str:
    return f".{name}.{token}.thaw-old"


def check_directory(target: str | os.PathLike[str], force: bool, ours: Callable[[str], bool]) -> None:
    """Refuse a target that cannot be written, or whose replacement would lose a file that is not ``ours``."""
    shown, path = repr(os.fspath(target)), Path(os.path.realpath(target))
    if os.path.ismount(path):
        raise UsageError(f"{shown} is a mount point, which cannot be replaced; name a directory in it")
    if os.path.isdir(path):
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
