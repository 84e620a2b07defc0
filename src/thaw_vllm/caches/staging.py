"""Many small files that appear whole or not at all, at the cost of one directory."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from ..transport.writer import hidden_name, link_or_rename, remove_stale_directories, sync_directory

_NAME = "thaw-caches"


class Staging:
    """A hidden directory in a place; files are written and synced there, and get their own names later.

    ``StagedFile`` for each of some hundred files takes thrice the time: it looks for what killed writers left, reserves
    and locks each time. Use as a context manager: leaving it removes what was not published. A process that is killed
    leaves the directory behind, which nothing reads; ``remove_stale`` removes it.

    Args:
        place: must exist.

    Raises:
        OSError: nothing can be made there.
    """

    def __init__(self, place: Path) -> None:
        self._folders: set[Path] = set()
        self._fd = -1
        while True:
            self.path = place / hidden_name(_NAME, secrets.token_hex(4))
            self.path.mkdir(mode=0o700)
            try:
                if self._locked():
                    return
            except BaseException:
                self.discard()
                raise
            self.discard()

    def _locked(self) -> bool:
        """Whether it is ours: before it is locked, another process may take it for stale."""
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # network file systems may lack locks; then nobody removes ours either
            return True
        return self.path.is_dir()

    def write(self, name: str, data: bytes) -> None:
        """Write and sync one; safe from several threads.

        Raises:
            OSError.
        """
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, memoryview(data)[done:], done)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, name: str, target: Path) -> bool:
        """Give one its own name, in a directory that exists; whether there was none of that name.

        Raises:
            OSError.
        """
        try:
            link_or_rename(self.path / name, target)
        except FileExistsError:
            return False
        self._folders.add(target.parent)
        return True

    def sync(self) -> None:
        """Make the names durable that were given."""
        while self._folders:
            sync_directory(self._folders.pop())

    def discard(self) -> None:
        """Remove what was not published; a second call does nothing."""
        fd, self._fd = self._fd, -1
        try:
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.discard()


def remove_stale(place: Path) -> None:
    """Remove what killed processes left in a place; what a living one writes to stays."""
    remove_stale_directories(place, _NAME)
