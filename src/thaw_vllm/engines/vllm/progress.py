"""A bar like vLLM's own for what takes long while a model is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class progress_bar:
    """A tqdm bar like vLLM's own on the first rank, or nothing; a context manager that gives the callback."""

    def __init__(self, verb: str, *, first: bool) -> None:
        self._verb, self._show = verb, first
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Callable[[int, int], None] | None:
        return self._advance if self._show else None

    def _advance(self, done: int, total: int) -> None:
        with self._lock:
            if self._bar is None:
                from tqdm.auto import tqdm

                # disable=None: shown on a terminal only.
                self._bar = tqdm(
                    total=total, unit="B", unit_scale=True, desc=self._verb, leave=False, delay=1, disable=None
                )
            self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
