"""Models whose start has failed, and when they are tried again."""

from __future__ import annotations

import time
from dataclasses import dataclass

BACKOFF = (1.0, 5.0, 30.0, 120.0)
"""Seconds until a model whose start has failed once, twice, … is tried again."""


@dataclass(frozen=True)
class Failure:
    """Of one model.

    Attributes:
        count: how often in a row.
        until: when it is tried again, by ``time.monotonic``.
        why: for people.
    """

    count: int
    until: float
    why: str

    @property
    def pause(self) -> float:
        """Seconds from now until it is tried again; 0 or less: it may be."""
        return self.until - time.monotonic()


class Failures:
    """By a model's name."""

    def __init__(self) -> None:
        self._found: dict[str, Failure] = {}

    def note(self, name: str, why: str) -> Failure:
        """Once more."""
        before = self._found.get(name)
        count = 1 if before is None else before.count + 1
        until = time.monotonic() + BACKOFF[min(count, len(BACKOFF)) - 1]
        self._found[name] = Failure(count, until, f"the model {name!r} did not start: {why}")
        return self._found[name]

    def forget(self, name: str) -> None:
        """It is there."""
        self._found.pop(name, None)

    def last(self, name: str) -> Failure | None:
        """None where it did not fail the last time."""
        return self._found.get(name)

    def resting(self, name: str) -> Failure | None:
        """The last one, while it is not to be tried."""
        found = self._found.get(name)
        return None if found is None or found.pause <= 0 else found
