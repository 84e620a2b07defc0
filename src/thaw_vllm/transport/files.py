"""Many files as one source, so that what reads one reads them all in one go."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import CorruptionError, ReplacedError, StorageError
from .plan import BLOCK
from .source import FileSource, Source, ended, failed

_APART = 2 * BLOCK
"""Bytes of nothing between two files at least: more than what a plan reads along (``plan.steps``)."""


class Files:
    """The beginnings of many files: byte ``at`` of file ``n`` is the source's byte ``n * stride + at``.

    A Source. Nobody may ask for what lies between files. A file is opened by its path for each read, so that no more
    are open than there are readers: who replaces one meanwhile is found out by checksums alone.

    Attributes:
        name: what messages about all of them call them.
        paths: in order.
        stride: a multiple of BLOCK.
    """

    listed = True
    """What ``descriptor`` is of: a list, not a file to be read."""

    def __init__(self, paths: Sequence[str], length: int, name: str) -> None:
        """
        Args:
            paths: of the files.
            length: bytes from the beginning of each that may be asked for.
        """
        self.name, self.paths = name, paths
        self.stride = -(-length // BLOCK) * BLOCK + _APART
        self.size = self.stride * len(paths)
        self._list = -1

    @property
    def descriptor(self) -> int:
        """A file in memory with the stride and every path, a zero byte after each but the last; this object's to close.

        Raises:
            OSError: there can be none.
        """
        if self._list < 0:
            made = os.memfd_create("thaw-files", os.MFD_CLOEXEC)
            try:
                with open(made, "wb", closefd=False) as file:
                    file.write(b"\0".join([str(self.stride).encode(), *map(os.fsencode, self.paths)]))
            except BaseException:
                os.close(made)
                raise
            self._list = made
        return self._list

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source; also raises StorageError when a file cannot be opened, or read."""
        path, at = self._at(offset)
        with FileSource(path) as file:
            file.read_into(at, view)

    def failed(self, offset: int, error: OSError) -> StorageError:
        """What to raise when reading at ``offset`` failed."""
        return failed(*self._at(offset), error)

    def ended(self, offset: int, needed: int) -> CorruptionError:
        """What to raise when a file ends at ``offset`` and should have gone on to ``needed``."""
        path, at = self._at(offset)
        return ended(path, at, at + needed - offset)

    def check_unchanged(self) -> None:
        """Nothing is held open that could change."""

    def close(self) -> None:
        """Close the list; a second call does nothing."""
        if self._list >= 0:
            os.close(self._list)
            self._list = -1

    def _at(self, offset: int) -> tuple[str, int]:
        number, at = divmod(offset, self.stride)
        return self.paths[number], at


class Joined(Files):
    """Open files as one source: byte ``at`` of file ``n`` is its byte ``n * stride + at``.

    Borrows the files. They are read as they are held open; helpers alone open them by their paths.

    Attributes:
        name: the first one's.
    """

    def __init__(self, files: Sequence[FileSource]) -> None:
        super().__init__([os.path.abspath(f.path) for f in files], max(f.size for f in files), files[0].name)
        self._files = files

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        number, at = divmod(offset, self.stride)
        self._files[number].read_into(at, view)

    def check_unchanged(self) -> None:
        """See Source; a file that was renamed over counts as well, since a helper may have opened the new one."""
        for file in self._files:
            file.check_unchanged()
            if file.replaced:
                raise ReplacedError(f"{file.name!r} was replaced while it was being read; run it again")


def place(source: Source, offset: int) -> tuple[str, int]:
    """What messages call the file that a byte of a source lies in, and its place there."""
    return source._at(offset) if isinstance(source, Joined) else (source.name, offset)
