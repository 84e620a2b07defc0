"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_SET_PDEATHSIG = 1
"""Of ``prctl(2)``."""


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends; at once if it has. Outlives ``exec``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
