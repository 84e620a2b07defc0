"""Where servers keep what outlives them: a private directory of the user's."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from ..errors import StorageError
from ..transport.private import STATE as VARIABLE
from ..transport.private import state_path

KEPT = 20
"""Reports of starts, and logs of pools, that are kept."""


def state_directory() -> Path:
    """THAW_STATE_DIR, else ``thaw`` below XDG_STATE_HOME or ~/.local/state; made, for its owner alone.

    Raises:
        StorageError: it cannot be made, belongs to somebody else, or others may write to it.
    """
    path = state_path(os.environ)
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        found = path.stat()
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"the directory {str(path)!r} cannot be made: {error}; set {VARIABLE} to one that can"
        ) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise StorageError(
            f"others may write to {str(path)!r}, where servers keep their admin token; chmod 700 it, or set {VARIABLE} "
            "to another directory"
        )
    return path


def new_start() -> Path:
    """A directory for the report of a server's start; the oldest ones are removed.

    Raises:
        StorageError: it cannot be made.
    """
    return _new("starts")


def start_of(pid: int | None) -> Path | None:
    """The directory with the report of the start of ``thaw serve`` as this process; None where there is none."""
    try:
        found = sorted((state_directory() / "starts").glob(f"*-{pid}"))
    except (StorageError, OSError):
        return None
    return found[-1] if found else None


def new_logs() -> Path:
    """A directory for the logs of a pool's engines; the oldest ones are removed.

    Raises:
        StorageError: it cannot be made.
    """
    return _new("logs")


def _new(kind: str) -> Path:
    below = state_directory() / kind
    path = below / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the directory {str(path)!r} cannot be made: {error}") from None
    others = sorted(old for old in below.iterdir() if old != path and not _in_use(old))
    for old in others[: max(0, len(others) + 1 - KEPT)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(old)
    return path


def _in_use(path: Path) -> bool:
    """Whether the process lives that it was made for; or another one that has its number by now."""
    pid = path.name.rpartition("-")[2]
    return pid.isdecimal() and pid != "0" and os.path.exists(f"/proc/{pid}")
