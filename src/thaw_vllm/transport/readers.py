"""How ranges of a source get into staging memory: one class a way, and the choice among them."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from types import TracebackType
from typing import Protocol

from ..errors import UsageError
from .files import Files
from .medium import IN_MEMORY, file_system, open_direct
from .plan import BLOCK
from .residency import Residency
from .source import FileSource, Source, copy

ROUTES = ("auto", "cached", "direct")
"""``auto`` lets the library choose, ``cached`` reads through the page cache, ``direct`` past it."""

SAMPLES = 256
"""Pages that are looked at to see whether a file is cached as a whole; asking about all of 16 GB takes 0.2 s."""


class Reader(Protocol):
    """Brings ranges of one source into memory; safe in several threads; close it before the source.

    Attributes:
        route: what reports call it.
        why: why it was chosen, for reports.
        margin: how much longer than the range the memory has to be.
    """

    route: str
    why: str
    margin: int

    def read(self, offset: int, length: int, view: memoryview) -> int:
        """Bring ``length`` bytes from ``offset`` into ``view``.

        Args:
            view: writable, at least ``length + margin`` bytes; aligned to BLOCK where ``margin`` is not 0.

        Returns:
            Where in ``view`` the first of them is.

        Raises:
            CorruptionError: the source ends before them.
            StorageError: the device failed.
        """

    def summary(self) -> dict[str, int]:
        """Bytes by where they came from, so far."""

    def close(self) -> None:
        """Let go of what the reader itself opened."""


class Cached:
    """Plain reads of any source: the page cache for files, a copy for memory. Works everywhere."""

    margin = 0

    def __init__(self, source: Source, route: str, why: str) -> None:
        self._source, self.route, self.why = source, route, why

    def read(self, offset: int, length: int, view: memoryview) -> int:
        """See Reader."""
        self._source.read_into(offset, view[:length])
        return 0

    def summary(self) -> dict[str, int]:
        """Nothing to tell apart."""
        return {}

    def close(self) -> None:
        """Nothing of its own is open."""


class Direct:
    """Reads that bypass the page cache (O_DIRECT), for cold files on disks; with ``peek``, only what is not cached.

    So a file that is cached in part is read at memory's speed where it is and at the disk's elsewhere, and what was not
    cached stays uncached: nothing else is pushed out of memory.
    """

    margin = 2 * BLOCK

    def __init__(self, source: FileSource, why: str, *, peek: bool) -> None:
        """
        Raises:
            OSError: the file system has no direct I/O.
        """
        self._source, self.why = source, why
        self.route = "page cache, else direct" if peek else "direct"
        self._file = open_direct(source.descriptor, os.O_RDONLY)
        try:
            self._residency = Residency(source.descriptor, source.size) if peek else None
        except BaseException:
            os.close(self._file)
            raise
        self._lock = threading.Lock()
        self._bytes = {"cached": 0, "direct": 0}

    def read(self, offset: int, length: int, view: memoryview) -> int:
        """See Reader."""
        if self._residency is not None and self._residency.whole(offset, length):
            self._source.read_into(offset, view[:length])
            head, cached = 0, length
        else:
            head, direct = self._direct(offset, length, view)
            cached = length - direct
        with self._lock:
            self._bytes["cached"] += cached
            self._bytes["direct"] += length - cached
        return head

    def _direct(self, offset: int, length: int, view: memoryview) -> tuple[int, int]:
        """Where the first byte is, and how many came past the page cache."""
        low = offset // BLOCK * BLOCK
        head = offset - low
        want = -(-(head + length) // BLOCK) * BLOCK
        done = 0
        # A short read that ends on a block is gone on with.
        while done < head + length and not done % BLOCK:
            try:
                count = os.preadv(self._file, [view[done:want]], low + done)
            except OSError as error:
                if error.errno != errno.EINVAL:  # blocks larger than ours
                    raise self._source.failed(low + done, error) from None
                break
            if not count:
                break
            done += count
        direct = min(max(done - head, 0), length)
        if direct < length:  # plain reads know whether the file ends here or only direct reads do
            self._source.read_into(offset + direct, view[head + direct : head + length])
        return head, direct

    def summary(self) -> dict[str, int]:
        """Bytes from the page cache and from the device."""
        with self._lock:
            return dict(self._bytes)

    def close(self) -> None:
        """Close the second descriptor; a second call does nothing."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
        if self._residency is not None:
            self._residency.close()

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Through:
    """A source that reads by a reader which wants aligned memory, through a block of such memory for each thread."""

    STEP = 1 << 20

    def __init__(self, source: Source, reader: Reader) -> None:
        """Borrows both."""
        self._source, self._reader = source, reader
        self.name, self.size = source.name, source.size
        self._local = threading.local()

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        room: mmap.mmap | None = getattr(self._local, "room", None)
        if room is None:
            room = self._local.room = mmap.mmap(-1, self.STEP + self._reader.margin)
        with memoryview(room) as block:
            for at in range(0, len(view), self.STEP):
                part = view[at : at + self.STEP]
                head = self._reader.read(offset + at, len(part), block)
                copy(part, block[head : head + len(part)])

    def check_unchanged(self) -> None:
        """See Source."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Nothing: the source is somebody else's."""


def choose(source: Source, route: str = "auto", *, staged: bool = True) -> Reader:
    """The reader for a source, probing the medium; ``why`` says what was found.

    Args:
        source: stays the caller's.
        route: one of ROUTES. ``direct`` falls back to plain reads where there is no direct I/O, and says so.
        staged: whether the bytes pass through staging memory anyhow. If not, the page cache saves a copy.

    Raises:
        UsageError: an unknown route.
    """
    if route not in ROUTES:
        raise UsageError(f"route must be one of {', '.join(ROUTES)}, not {route!r}")
    if isinstance(source, Files):
        return Cached(source, "files", "they are read through the page cache")
    if not isinstance(source, FileSource):
        return Cached(source, "memory", "the bytes are in memory already")
    kind = file_system(source.descriptor)
    if kind in IN_MEMORY:
        return Cached(source, "tmpfs", f"the file is on {kind}: its bytes are memory already")
    if route == "cached":
        return Cached(source, "page cache", "the page cache was asked for")
    if route == "auto" and not staged:
        return Cached(source, "page cache", "it is read into host memory, and the page cache saves a copy")
    named = kind or "this file system"
    try:
        if route == "direct":
            return Direct(source, f"direct reads were asked for, and {named} has them", peek=False)
        if not source.size:
            return Cached(source, "page cache", "the file is empty")
        if _cached(source):
            return Cached(source, "page cache", f"it is in the page cache: all of {SAMPLES} samples are")
        return Direct(source, f"{named} has direct reads for what is not cached", peek=True)
    except OSError as error:
        return Cached(source, "page cache", f"{named} refuses direct reads: {error.strerror}")


def _cached(source: FileSource) -> bool:
    """Whether every one of SAMPLES pages all over the file is in the page cache; wrong guesses cost speed alone."""
    residency = Residency(source.descriptor, source.size)
    try:
        last = source.size - 1
        return all(residency.whole(last * number // (SAMPLES - 1), 1) for number in range(SAMPLES))
    finally:
        residency.close()
