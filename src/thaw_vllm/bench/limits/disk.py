"""The disk: direct reads and writes of 8 MiB by several threads, past the page cache."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import StorageError
from ...transport import parallel
from ..child import Steps

STEP = 8 << 20


def buffer() -> mmap.mmap:
    """Memory of one step, aligned to a page as direct I/O wants it, and touched."""
    made = mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.write(os.urandom(1 << 20) * (STEP >> 20))
    return made


def by_threads(size: int, threads: int, step: int, work: Callable[[int, mmap.mmap], None]) -> float:
    """Seconds in which ``work(offset, memory)`` went over ``size`` bytes; each thread has memory of its own."""
    local, rooms = threading.local(), [buffer() for _ in range(threads)]
    lock = threading.Lock()

    def body(at: int) -> None:
        room: mmap.mmap | None = getattr(local, "room", None)
        if room is None:
            with lock:
                room = local.room = rooms.pop()
        work(at, room)

    start = time.perf_counter()
    parallel.run(range(0, size, step), body, threads)
    return time.perf_counter() - start


def direct(path: Path, flags: int) -> int:
    """Open for direct I/O.

    Raises:
        StorageError: the file system has none.
    """
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{str(path.parent)!r} has no direct I/O: {error.strerror}") from None


def write(path: Path, size: int, threads: int) -> float:
    """Seconds of writing a new file of ``size`` bytes and of the fsync after it."""
    path.unlink(missing_ok=True)
    file = direct(path, os.O_CREAT | os.O_WRONLY)
    try:

        def step(at: int, room: mmap.mmap) -> None:
            if os.pwrite(file, room, at) != STEP:
                raise StorageError(f"{str(path)!r} took less than it was given; is the disk full?")

        seconds = by_threads(size, threads, STEP, step)
        start = time.perf_counter()
        os.fsync(file)
        return seconds + time.perf_counter() - start
    finally:
        os.close(file)


def read(path: Path, size: int, threads: int) -> float:
    """Seconds of reading it."""
    file = direct(path, os.O_RDONLY)
    try:

        def step(at: int, room: mmap.mmap) -> None:
            if os.preadv(file, [room], at) != STEP:
                raise StorageError(f"{str(path)!r} ended early")

        return by_threads(size, threads, STEP, step)
    finally:
        os.close(file)


def disk_write(request: dict[str, Any]) -> Steps:
    """A new file each run; the last one stays for ``disk_read``."""
    path, size = Path(request["path"]), max(STEP, request["bytes"] // STEP * STEP)
    yield
    yield
    seconds = [write(path, size, request["threads"]) for _ in range(request["runs"])]
    yield
    return {"seconds": seconds, "bytes": size, "route": "direct, 8 MiB, fsync", "threads": request["threads"]}


def disk_read(request: dict[str, Any]) -> Steps:
    """Of the file that ``disk_write`` left, or the first ``bytes`` of another."""
    path = Path(request["path"])
    size = min(path.stat().st_size, request["bytes"]) // STEP * STEP
    if not size:
        raise StorageError(f"{str(path)!r} is shorter than the {STEP >> 20} MiB that are read at a time")
    yield
    yield
    seconds = [read(path, size, request["threads"]) for _ in range(request["runs"])]
    yield
    return {"seconds": seconds, "bytes": size, "route": "direct, 8 MiB", "threads": request["threads"]}


TASKS = {"disk-write": disk_write, "disk-read": disk_read}
