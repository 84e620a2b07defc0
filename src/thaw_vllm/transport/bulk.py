"""How large pieces get into a file that is being written: one class a way, and the choice among them."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Protocol

from .medium import IN_MEMORY, file_system, open_direct
from .plan import BLOCK
from .source import copy
from .staging import address_of, populate

LARGE = 64 << 20
"""Bytes from which a file is worth more than plain writes."""


class Bulk(Protocol):
    """Writes pieces of one open file, from several threads at once.

    Attributes:
        route: what reports call it.
        why: why it was chosen, for reports.
        aligned: whether pieces should lie at a multiple of BLOCK in memory too, and be whole blocks long.
    """

    route: str
    why: str
    aligned: bool

    def write(self, offset: int, view: memoryview) -> None:
        """Write a piece; any alignment is right, some are faster. Raises OSError."""

    def close(self) -> None:
        """Let go of what it opened itself; the file is somebody else's."""


class Plain:
    """``pwrite``, through the page cache."""

    aligned = False

    def __init__(self, descriptor: int, why: str) -> None:
        self._file, self.route, self.why = descriptor, "page cache", why

    def write(self, offset: int, view: memoryview) -> None:
        """See Bulk."""
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset + done)

    def close(self) -> None:
        """Nothing of its own is open."""


class Direct(Plain):
    """``pwrite`` past the page cache (O_DIRECT): the disk's speed, and nothing is pushed out of memory."""

    aligned = True

    def __init__(self, descriptor: int, why: str) -> None:
        """
        Raises:
            OSError: the file system has no direct I/O.
        """
        super().__init__(descriptor, why)
        self.route = "direct"
        self._direct = open_direct(descriptor, os.O_WRONLY)

    def write(self, offset: int, view: memoryview) -> None:
        """See Bulk; a piece that is not aligned goes through the page cache."""
        if offset % BLOCK or len(view) % BLOCK or not len(view) or address_of(view) % BLOCK:
            return super().write(offset, view)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._direct, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:  # blocks larger than ours
                    raise
                return super().write(offset + done, view[done:])
            if done % BLOCK:  # a short write left off inside a block
                return super().write(offset + done, view[done:])

    def close(self) -> None:
        """Close the second descriptor; a second call does nothing."""
        if self._direct >= 0:
            file, self._direct = self._direct, -1
            os.close(file)


class Mapped(Plain):
    """Stores into shared mappings, for tmpfs: there ``pwrite`` takes the file's lock, one thread at a time.

    Each piece is mapped on its own, so that threads take and give back page tables side by side too. A store into a
    page that the file system has no room for would end the process. So the pages of a piece are taken first, by a call
    that says when there are none, and then the plain write tells it as an error.
    """

    def __init__(self, descriptor: int, size: int, why: str) -> None:
        """
        Args:
            size: the file's bytes, which it has already: nothing beyond them is mapped.

        Raises:
            OSError: it cannot be mapped.
        """
        super().__init__(descriptor, why)
        self.route, self._size = "shared mapping", size
        mmap.mmap(descriptor, 1, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()

    def write(self, offset: int, view: memoryview) -> None:
        """See Bulk."""
        end = offset + len(view)
        low = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if not len(view) or end > self._size:
            return super().write(offset, view)
        with mmap.mmap(self._file, end - low, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=low) as piece:
            if not populate(address_of(piece), end - low):
                return super().write(offset, view)
            with memoryview(piece) as room:
                copy(room[offset - low :], view)


def choose(descriptor: int, size: int) -> Bulk:
    """The way for a file of ``size`` bytes, open for reading and writing and of that size already."""
    if size < LARGE:
        return Plain(descriptor, "the file is small")
    kind = file_system(descriptor)
    named = kind or "this file system"
    try:
        if kind in IN_MEMORY:
            return Mapped(descriptor, size, f"{named} lets one thread at a time write a file, but many store into it")
        return Direct(descriptor, f"{named} has direct writes")
    except OSError as error:
        return Plain(descriptor, f"{named} refuses better: {error.strerror}")
