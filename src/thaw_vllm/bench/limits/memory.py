"""Files in memory: writing a new one on tmpfs, by two routes, and reading one into small buffers."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from ...errors import SpaceError, StorageError
from ...transport import parallel
from ..child import Steps
from .disk import STEP, by_threads

SMALL = 1 << 20
"""A reader's buffer: it stays in the processor's cache, so that memory is read and hardly written."""


def by_pwrite(path: Path, size: int, threads: int) -> float:
    """Seconds of writing a new file by ``pwrite``, which the kernel lets one thread at a time do to one file."""
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:

        def step(at: int, room: mmap.mmap) -> None:
            if os.pwrite(file, room, at) != STEP:
                raise StorageError(f"{str(path)!r} took less than it was given; is there room?")

        return by_threads(size, threads, STEP, step)
    finally:
        os.close(file)


def by_mapping(path: Path, size: int, threads: int) -> float:
    """Seconds of writing a new file by stores into a shared mapping, in all threads."""
    import numpy as np

    path.unlink(missing_ok=True)
    free = os.statvfs(path.parent)
    if free.f_bavail * free.f_frsize < size:  # a store without room would end the process (SIGBUS)
        raise SpaceError(f"{str(path.parent)!r} needs {size / 1e9:.1f} GB free for this")
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, size)
        mapping = mmap.mmap(file, size)
    finally:
        os.close(file)
    target = np.frombuffer(mapping, dtype=np.uint64)

    def step(at: int, room: mmap.mmap) -> None:
        np.copyto(target[at // 8 : (at + STEP) // 8], np.frombuffer(room, dtype=np.uint64))

    return by_threads(size, threads, STEP, step)


def by_reading(path: Path, size: int, threads: int) -> float:
    """Seconds of reading a file that is in memory, keeping nothing."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def step(at: int, room: mmap.mmap) -> None:
            with memoryview(room) as view:
                for low in range(at, min(at + STEP, size), SMALL):
                    os.preadv(file, [view[:SMALL]], low)

        return by_threads(size, threads, STEP, step)
    finally:
        os.close(file)


ROUTES = {"pwrite": by_pwrite, "mapping": by_mapping}


def tmpfs_write(request: dict[str, Any]) -> Steps:
    """``route`` of ROUTES; a run that is not counted comes first, since a virtual machine may get its memory by it."""
    path, size = Path(request["path"]), max(STEP, request["bytes"] // STEP * STEP)
    write, threads = ROUTES[request["route"]], request["threads"]
    yield
    write(path, size, threads)
    yield
    seconds = [write(path, size, threads) for _ in range(request["runs"])]
    yield
    return {"seconds": seconds, "bytes": size, "route": request["route"], "threads": threads}


def memory_read(request: dict[str, Any]) -> Steps:
    """The first ``bytes`` of ``path``, made first where it is not there."""
    path, threads = Path(request["path"]), request["threads"]
    yield
    if not path.exists():
        by_pwrite(path, max(STEP, request["bytes"] // STEP * STEP), parallel.default_workers())
    size = min(path.stat().st_size, max(STEP, request["bytes"]))
    by_reading(path, size, threads)
    yield
    seconds = [by_reading(path, size, threads) for _ in range(request["runs"])]
    yield
    return {"seconds": seconds, "bytes": size, "route": "preadv, 1 MiB", "threads": threads}


TASKS = {"tmpfs-write": tmpfs_write, "memory-read": memory_read}
