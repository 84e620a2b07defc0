"""How much of a file is in the page cache, and getting it out of there or into it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ..transport import parallel
from ..transport.residency import Residency

COLD, WARM = 0.01, 0.99
"""A file counts as cold with at most, as warm with at least this share of its pages in memory."""

PAGE = mmap.PAGESIZE
_CACHESTAT = 451
"""Number of the system call since Linux 6.5, the same on all architectures."""
_WINDOW = 1 << 30
"""Bytes that mincore is asked about at a time."""
_STEP = 8 << 20


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = (
        *(("cached", ctypes.c_uint64), ("dirty", ctypes.c_uint64), ("writeback", ctypes.c_uint64)),
        *(("evicted", ctypes.c_uint64), ("recently_evicted", ctypes.c_uint64)),
    )


def resident(path: str | os.PathLike[str]) -> float:
    """The share of the file's pages that are in memory, 0 to 1; an empty file counts as 0."""
    with open(path, "rb") as file:
        pages = -(-os.fstat(file.fileno()).st_size // PAGE)
        if not pages:
            return 0.0
        found = by_cachestat(file.fileno())
        return (by_mincore(file.fileno()) if found is None else found) / pages


def of_all(paths: Sequence[Path]) -> float:
    """``resident`` of several files together."""
    sizes = [os.path.getsize(path) for path in paths]
    return sum(resident(path) * size for path, size in zip(paths, sizes, strict=True)) / max(sum(sizes), 1)


def by_cachestat(descriptor: int) -> int | None:
    """Pages of an open file in the page cache; None where the kernel or the file system does not tell."""
    stat, whole = _Stat(), _Range(0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(_CACHESTAT, descriptor, ctypes.byref(whole), ctypes.byref(stat), 0)
    return None if failed else int(stat.cached)


def by_mincore(descriptor: int) -> int:
    """The same from a mapping: slower, on every kernel. Other users' files count as resident (mincore(2))."""
    size = os.fstat(descriptor).st_size
    with contextlib.closing(Residency(descriptor, size)) as found:
        return sum(found.pages(at, min(_WINDOW, size - at)) for at in range(0, size, _WINDOW))


def drop(paths: Sequence[Path]) -> float:
    """Write back and drop the files' pages; returns what share is in memory still (on tmpfs: all of it)."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = of_all(paths)
    if left > COLD and os.geteuid() == 0:
        # Pages that another process maps, or that are in use by the kernel at this moment, outlast the advice.
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("1")
        left = of_all(paths)
    return left


def fill(paths: Sequence[Path]) -> float:
    """Read the files once; returns what share is in memory afterwards, less than 1 where memory is short."""
    local = threading.local()

    def skim(task: tuple[int, int]) -> None:
        descriptor, at = task
        if not hasattr(local, "room"):
            local.room = bytearray(_STEP)
        os.preadv(descriptor, [local.room], at)

    if of_all(paths) < 1:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")).fileno() for path in paths]
            steps = [(file, at) for file in files for at in range(0, os.fstat(file).st_size, _STEP)]
            parallel.run(steps, skim, parallel.default_workers())
    return of_all(paths)
