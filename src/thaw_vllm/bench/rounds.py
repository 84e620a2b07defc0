"""Running systems against each other: fresh processes, one after the other, in an order that turns with every round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .footprint import Watch
from .outcome import Missed, Say
from .process import COMMAND, DONE, PREPARED, READY, RESULT, STARTING, Child, ChildError


@dataclass(frozen=True)
class Entry:
    """One competitor in one work.

    Attributes:
        system: its name.
        label: what tells apart two entries of one system, such as ``verified``; may be empty.
        task, request: for ``child``.
        files: what it reads; brought into the wanted state just before its clock starts.
    """

    system: str
    label: str
    task: str
    request: dict[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.system} ({self.label})" if self.label else self.system


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        answer: of the child.
        process_mib, machine_mib: the most memory beyond what was held before the clock started; see ``footprint``.
        residency: what share of its files was in memory when the clock started; None if nobody looked.
    """

    answer: dict[str, Any]
    process_mib: float | None
    machine_mib: float
    residency: float | None


def run(
    work: str,
    entries: Sequence[Entry],
    rounds: int,
    state: Callable[[Entry], float | None],
    say: Say,
    folders: Sequence[Path] = (),
    command: Sequence[str] = COMMAND,
) -> tuple[dict[str, list[Sample]], list[Missed]]:
    """Samples by the entries' names, and what failed; an entry that fails takes no part in later rounds.

    A round's processes are started together and do their imports at the same time; then each runs alone, while the
    others wait for a line of input.

    Args:
        work: its name, for messages.
        entries: who takes part.
        rounds: how many fresh processes each gets.
        state: brings an entry's files into the page cache or out of it, and gives their residency; what it raises as
            ChildError fails the entry.
        say: progress.
        folders: files below these are page cache, not memory held.
        command: see Child.
    """
    samples: dict[str, list[Sample]] = {entry.name: [] for entry in entries}
    missed: dict[str, Missed] = {}
    for number in range(rounds):
        turned = [*entries[number % len(entries) :], *entries[: number % len(entries)]] if entries else []
        turned = [entry for entry in turned if entry.name not in missed]
        with contextlib.ExitStack() as stack:
            children: dict[str, Child | ChildError] = {}
            for entry in turned:
                children[entry.name] = _started(entry, stack, command)
            for entry in turned:
                child = children[entry.name]
                try:
                    if isinstance(child, ChildError):
                        raise child
                    sample = _one(child, entry, state, folders)
                except ChildError as error:
                    missed[entry.name] = Missed(work, entry.system, entry.label, str(error))
                    say(f"{work}, {entry.name}: {error}")
                    continue
                finally:
                    if isinstance(child, Child):
                        child.close()  # its memory is the next one's
                samples[entry.name].append(sample)
                say(f"{work}, round {number + 1} of {rounds}, {entry.name}: {_seconds(sample)} s")
    return samples, list(missed.values())


def _started(entry: Entry, stack: contextlib.ExitStack, command: Sequence[str]) -> Child | ChildError:
    try:
        return stack.enter_context(Child(entry.task, entry.request, command))
    except ChildError as error:
        return error


def _one(child: Child, entry: Entry, state: Callable[[Entry], float | None], folders: Sequence[Path]) -> Sample:
    child.reach(READY, STARTING)
    child.go()
    child.reach(PREPARED)
    residency = state(entry)
    with Watch(child.pid, folders) as watch:
        child.go()
        child.reach(DONE)
    child.go()
    return Sample(child.reach(RESULT)["result"], watch.process_mib, watch.machine_mib, residency)


def _seconds(sample: Sample) -> str:
    found = sample.answer["seconds"]
    return ", ".join(f"{s:.3f}" for s in (found if isinstance(found, list) else [found]))
