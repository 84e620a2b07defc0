"""Directories that are their owner's alone: whoever could write to them could give engines anything."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ..errors import StorageError

STATE = "THAW_STATE_DIR"


def state_path(environment: Mapping[str, str]) -> Path:
    """Where what outlives a process is kept: THAW_STATE_DIR, else ``thaw`` below XDG_STATE_HOME or ~/.local/state.

    Raises:
        RuntimeError: there is no home directory.
    """
    chosen, home = environment.get(STATE), environment.get("XDG_STATE_HOME")
    path = Path(chosen) if chosen else (Path(home) if home else Path.home() / ".local" / "state") / "thaw"
    return Path(os.path.abspath(path))


def private(directory: Path, cure: str, *, write: bool = True) -> None:
    """Make a directory for its owner alone, or hold the one that is there against that.

    Args:
        cure: what to do about one that will not do, for messages.
        write: it has to be writable.

    Raises:
        StorageError: it cannot be made or written to, belongs to somebody else, or others may write to it.
    """
    try:
        if write:
            directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise StorageError(f"the directory {str(directory)!r} cannot be made: {error.strerror or error}") from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise StorageError(f"others may write to {str(directory)!r}; chmod 700 it, or {cure}")
    if write and not os.access(directory, os.W_OK | os.X_OK):
        raise StorageError(f"the directory {str(directory)!r} is not writable; {cure}")
