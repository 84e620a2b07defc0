"""What must be true of a process for its forks to be as good as fresh ones, and how it is found out.

A fork has one thread, whatever the process had. Locks that other threads held stay locked in it, and GNU's OpenMP waits
for the threads of its pool, which are not there, for ever. A CUDA context cannot be used in a fork at all. Pools of
OpenBLAS are taken down and made again around a fork by OpenBLAS itself (``pthread_atfork``), so they may be there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from typing import Any

_NOT_INITIALIZED = 3
"""``CUDA_ERROR_NOT_INITIALIZED`` of the driver API: nobody in this process has called ``cuInit``."""
OF_LIBRARIES = ("ZMQbg", "cuda", "jemalloc_bg_thd")
"""Beginnings of the names of threads that nobody misses in a fork: ZeroMQ and jemalloc make new ones there, and that of
NVML, by which vLLM looks for GPUs, has done its work. That CUDA itself was not used is asked of the driver."""
_NAMED = 0.5
"""Seconds that a new thread is given to take its name."""


def native_threads() -> dict[int, str]:
    """Threads that the kernel knows of this process, by id, with their names; without the main one and OF_LIBRARIES."""
    found = {}
    for entry in os.listdir("/proc/self/task"):
        if int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/self/task/{entry}/comm", errors="replace") as file:
                name = file.read().strip()
        except OSError:  # it has ended
            continue
        if not name.startswith(OF_LIBRARIES):
            found[int(entry)] = name
    return found


def driver() -> Any:
    """CUDA's driver where this process has it loaded, else None: then nobody can have used it."""
    try:
        return ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def unsound(pools: int, cuda: Any = None) -> str | None:
    """Why this process must not be forked; None if it may be.

    Args:
        pools: native threads of BLAS pools that are known to survive it.
        cuda: the driver to ask, ``driver()`` unless given.
    """
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        return f"another Python thread runs: {', '.join(map(repr, others))}"
    if len(sys._current_frames()) > 1:
        return "another thread runs Python"
    threads = native_threads()
    if len(threads) > pools:
        names = ", ".join(sorted(set(threads.values())))
        return f"{len(threads)} native threads run ({names}) where {pools} are known; an OpenMP pool?"
    return _used(driver() if cuda is None else cuda)


def _used(cuda: Any) -> str | None:
    if cuda is not None:
        context = ctypes.c_void_p()
        answer = int(cuda.cuCtxGetCurrent(ctypes.byref(context)))
        if answer != _NOT_INITIALIZED:
            return f"CUDA has been initialised (cuCtxGetCurrent says {answer})"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "torch has initialised CUDA"
    return None


def fork_of_program(cuda: Any = None) -> str | None:
    """Why a program, which has no BLAS pools from before, must not be forked for an engine; None if it may be."""
    deadline = time.monotonic() + _NAMED
    while others := _unknown():  # a thread has its parent's name until it has run for the first time
        if time.monotonic() > deadline:
            return f"threads run: {', '.join(map(repr, others))}"
        time.sleep(0.01)
    return _used(driver() if cuda is None else cuda)


def _unknown() -> list[str]:
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    return sorted(python.get(number) or name for number, name in native_threads().items())
