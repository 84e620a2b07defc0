"""What the last starts of a pool's engines spent their time on: the reports that each server keeps of its own."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from ..engines.vllm.start_report import UNTIL_REQUEST, StartReport, read
from ..errors import ThawError
from .events import Event
from .state import KEPT, start_of


class Starts:
    """Noted as they happen."""

    def __init__(self) -> None:
        self._noted: deque[Event] = deque(maxlen=KEPT)
        self._whole: dict[Path, dict[str, Any]] = {}

    def note(self, event: Event) -> None:
        """One event of the pool's."""
        if event.what == "started":
            self._noted.append(event)

    def documents(self) -> list[dict[str, Any]]:
        """The last starts, the latest first, each with its phases where there is a report. Reads files."""
        found, whole = [], {}
        for event in reversed(list(self._noted)):  # the loop may note another one meanwhile
            more = event.more
            told = {"model": more["model"], "engine": more.get("engine"), "time": round(event.time, 3)}
            told["ready_seconds"] = more["seconds"]
            path = start_of(more.get("engine"))
            if path is not None:
                if path not in self._whole:
                    told |= (described := _described(path))
                    if described.get("first_token"):
                        whole[path] = described  # nothing is written after that
                else:
                    told |= self._whole[path]
                    whole[path] = self._whole[path]
            found.append(told)
        self._whole = whole
        return found


def _described(path: Path) -> dict[str, Any]:
    try:
        return phases(read(path))
    except (ThawError, OSError):
        return {}


def phases(report: StartReport) -> dict[str, Any]:
    """A report as plain values, as if the first request had come at once: a server may wait for it for hours."""
    idle = next((phase for phase in report.phases if phase.name == UNTIL_REQUEST), None)
    waited = 0.0 if idle is None else idle.seconds

    def since(time: float) -> float:
        return time if idle is None or time <= idle.begin else max(idle.begin, time - waited)

    shown = [
        {
            "phase": phase.name,
            "begin": round(since(phase.begin), 4),
            "end": round(since(phase.end), 4),
            "seconds": round(phase.seconds, 4),
        }
        for phase in report.phases
        if phase is not idle
    ]
    return {
        "total": round(report.total - waited, 4),
        "first_token": report.first_token,
        "waited": round(waited, 4),
        "phases": shown,
    }
