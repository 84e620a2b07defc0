"""Processes that do one thing each at the same moment, as the ranks of an engine do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .footprint import Watch
from .process import COMMAND, DONE, PREPARED, READY, RESULT, STARTING, Child
from .rounds import Entry


@dataclass(frozen=True)
class Round:
    """What they came to.

    Attributes:
        seconds: from the moment in which all were told to begin until the last one was done.
        answers: of each, in order.
        process_mib: the most that one of them took beyond what it had; None where nobody could tell.
        machine_mib: the same of the whole machine.
        residency: the least share of one's files in memory when the clock started; None if nobody looked.
    """

    seconds: float
    answers: list[dict[str, Any]]
    process_mib: float | None
    machine_mib: float
    residency: float | None


def run(
    entries: Sequence[Entry],
    state: Callable[[Entry], float | None],
    folders: Sequence[Path] = (),
    command: Sequence[str] = COMMAND,
) -> Round:
    """One fresh process for each entry; see ``rounds.run``.

    Raises:
        ChildError: of the first that failed; none of them is left.
    """
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(entry.task, entry.request, command)) for entry in entries]
        for child in children:
            child.reach(READY, STARTING)
        for child in children:
            child.go()
        for child in children:
            child.reach(PREPARED)
        found = [state(entry) for entry in entries]
        watches = [stack.enter_context(Watch(child.pid, folders)) for child in children]
        start = time.perf_counter()
        for child in children:
            child.go()
        for child in children:
            child.reach(DONE)
        seconds = time.perf_counter() - start
        for child in children:
            child.go()
        answers = [child.reach(RESULT)["result"] for child in children]
    peaks = [watch.process_mib for watch in watches if watch.process_mib is not None]
    return Round(
        seconds,
        answers,
        max(peaks, default=None),
        max(watch.machine_mib for watch in watches),
        min((share for share in found if share is not None), default=None),
    )
