"""The files that modules were loaded from, so that one that changed afterwards is noticed."""

from __future__ import annotations

import os
import sys

State = tuple[int, int, int]
"""Modification time in ns, size in bytes, inode."""


def loaded(since: float) -> dict[str, State | None]:
    """Every file that a module of this process came from, as it is now.

    None where it has none any more, and where it was written after ``since``, seconds of the epoch, when imports began:
    nobody knows which of the two was imported.
    """
    found = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and os.path.isabs(path):
            state = _state(path)
            found[path] = None if state is None or state[0] > since * 1e9 else state
    return found


def changed(files: dict[str, State | None]) -> str | None:
    """The first of ``files`` that is not what it was, or None; 3 µs a file."""
    return next((path for path, state in files.items() if _state(path) != state), None)


def _state(path: str) -> State | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
