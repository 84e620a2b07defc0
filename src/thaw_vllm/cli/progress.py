"""A progress bar for whatever takes longer than a second, on standard error, and only where a person looks at it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

DELAY = 1.0
"""Seconds before a bar appears."""


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives a callback for (bytes done, bytes in all), callable from any thread; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(verb)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    def __init__(self, verb: str) -> None:
        self._verb, self._start = verb, time.monotonic()
        self._lock = threading.Lock()
        self._shown: Any = None
        self._task: Any = None

    def advance(self, done: int, total: int) -> None:
        if self._shown is None and time.monotonic() - self._start < DELAY:
            return
        with self._lock:
            if self._shown is None:
                self._open(total)
            self._shown.update(self._task, completed=done, total=total)

    def _open(self, total: int) -> None:
        from rich import progress as rich_progress
        from rich.console import Console

        self._shown = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._shown.add_task(self._verb, total=total)
        self._shown.start()

    def close(self) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.stop()
