"""Two names that change places in one step, which Linux can and Python does not offer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def swap(first: Path, second: Path) -> bool:
    """Let two existing files or directories of one file system change places; False, and nothing done, if it cannot.

    Notes:
        renameat2(2): since Linux 3.15 on ext4, xfs, btrfs and tmpfs among others; NFS and others lack it.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # a C library without it
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    return done == 0
