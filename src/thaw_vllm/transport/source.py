"""Where bytes come from: a range of a file, or memory. Readers take a source, never a path."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ..errors import CorruptionError, ReplacedError, StorageError

_LARGE = 1 << 16
"""Bytes from which importing numpy and letting other threads run is worth it."""


class Source(Protocol):
    """A readable sequence of bytes; safe to read from several threads.

    Attributes:
        name: what messages call it.
        size: bytes in all.
    """

    name: str
    size: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` (writable, contiguous) from ``offset``; CorruptionError when the bytes end early."""

    def check_unchanged(self) -> None:
        """Raise ReplacedError when the bytes may have changed since the source was opened."""

    def close(self) -> None:
        """Let go of the file or memory."""


def copy(into: memoryview, data: memoryview) -> None:
    """Copy bytes; many of them without holding the interpreter lock, which a memoryview's own assignment holds."""
    if into.nbytes < _LARGE:
        into[:] = data
        return
    import numpy as np

    np.copyto(np.frombuffer(into, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))


def read_bytes(source: Source, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` as a new object; the caller has checked ``length`` against a limit."""
    data = bytearray(length)
    source.read_into(offset, memoryview(data))
    return bytes(data)


def failed(name: str, offset: int, error: OSError) -> StorageError:
    """What to raise when reading a file at ``offset`` failed."""
    return StorageError(f"reading {name!r} at {offset} failed: {error.strerror}")


def ended(name: str, offset: int, needed: int) -> CorruptionError:
    """What to raise when a file ends at ``offset`` and should have ``needed`` bytes."""
    return CorruptionError(f"{name!r} ends at {offset}, {needed} bytes were needed")


class FileSource:
    """A file read with ``preadv``; owns its descriptor."""

    listed = False
    """What ``descriptor`` is of: the file itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        try:
            # A pipe would block until somebody writes to it; it is opened at once and refused below.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise StorageError(f"{self.name!r} does not exist") from None
        except OSError as error:
            raise StorageError(f"cannot open {self.name!r}: {error.strerror}") from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise StorageError(f"{self.name!r} is not a file")
        self.size = status.st_size
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._inode = (status.st_dev, status.st_ino)

    @property
    def descriptor(self) -> int:
        """The open file's; this object's to close."""
        return self._fd

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source; also raises StorageError when the device fails."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise self.failed(offset + done, error) from None
            if not count:
                raise self.ended(offset + done, offset + len(view))
            done += count

    def failed(self, offset: int, error: OSError) -> StorageError:
        """See ``failed``."""
        return failed(self.name, offset, error)

    def ended(self, offset: int, needed: int) -> CorruptionError:
        """See ``ended``."""
        return ended(self.name, offset, needed)

    def check_unchanged(self) -> None:
        """A file renamed over ours leaves the bytes we hold alone; one written to in place does not."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise ReplacedError(f"{self.name!r} was written to while it was being read; run it again")

    @property
    def replaced(self) -> bool:
        """Whether the name points to another file by now (what was read is the earlier one, whole)."""
        try:
            status = os.stat(self.path)
        except OSError:
            return True
        return (status.st_dev, status.st_ino) != self._inode

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class MemorySource:
    """Bytes already in memory (bytes, mmap, shared memory, a numpy array); borrows them until closed."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "snapshot in memory") -> None:
        self.name = name
        self._view = memoryview(data).cast("B").toreadonly()
        self.size = len(self._view)

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        if offset + len(view) > self.size:
            raise CorruptionError(f"{self.name} ends at {self.size}, {offset + len(view)} bytes were needed")
        copy(view, self._view[offset : offset + len(view)])

    def check_unchanged(self) -> None:
        """Memory is the caller's; nothing to compare."""

    def close(self) -> None:
        """Release the view."""
        self._view.release()
