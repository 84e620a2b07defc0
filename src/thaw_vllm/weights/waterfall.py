"""Where the time of a freeze or restore went, as text."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Phases:
    """A clock that says what each phase took.

    Attributes:
        seconds: by phase, in order; a phase that comes again is added up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """What has happened since the phase before, or the beginning, was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def add(self, found: Mapping[str, float], rest: str) -> None:
        """The same time as phases that somebody else has measured, and what they do not cover as ``rest``."""
        now = time.perf_counter()
        for name, value in found.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.seconds[rest] = self.seconds.get(rest, 0.0) + max(0.0, now - self._last - sum(found.values()))
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start


def waterfall(seconds: Mapping[str, float], width: int = 40) -> str:
    """One line a phase, in order, each bar beginning where the one before it ended.

    Args:
        seconds: by phase; ``total`` is the length of the chart, and is not a phase.
        width: characters of the longest bar.
    """
    phases = {name: value for name, value in seconds.items() if name != "total"}
    total = max(seconds.get("total", 0.0), sum(phases.values()), 1e-9)
    label = max((len(name) for name in phases), default=0)
    lines, begun = [], 0.0
    for name, value in phases.items():
        first = min(round(begun / total * width), width - 1)
        last = max(round((begun + value) / total * width), first + 1)
        bar = (" " * first + "█" * (last - first)).ljust(width)
        lines.append(f"{name:<{label}}  {bar}  {value:7.3f} s  {value / total:4.0%}")
        begun += value
    return "\n".join(lines)
