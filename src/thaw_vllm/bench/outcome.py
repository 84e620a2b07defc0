"""What a benchmark came to: records, and a line for everything that gave none."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from .record import Record

Say = Callable[[str], None]
"""Takes a line about what is going on, for whoever waits."""


@dataclass(frozen=True)
class Missed:
    """Something that was to be measured and gave no figure.

    Attributes:
        work, system, route: as in a record; ``route`` may be empty.
        why: one line; the cure where there is one.
    """

    work: str
    system: str
    route: str
    why: str


@dataclass
class Outcome:
    """Of one command.

    Attributes:
        records: what was measured.
        missed: what gave no figure.
        interrupted: whether there was to be more.
    """

    records: list[Record] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    interrupted: bool = False

    def __iadd__(self, other: Outcome) -> Outcome:
        self.records += other.records
        self.missed += other.missed
        self.interrupted |= other.interrupted
        return self

    @property
    def wrong(self) -> list[Record]:
        """Those that gave other bytes."""
        return [record for record in self.records if record.equal is False]

    def limit(self, *works: str, directory: str | None = None) -> Record | None:
        """The slowest of the works' fastest routes (what a chain of them can reach); None if one was not measured.

        Args:
            directory: only measurements made there, and those that belong to no directory.
        """
        found: list[Record] = []
        for work in works:
            routes = [
                record
                for record in self.records
                if record.system == "limit"
                and record.work == work
                and (directory is None or record.extra.get("directory") in (directory, None))
            ]
            if not routes:
                return None
            found.append(max(routes, key=lambda record: record.gb_per_s))
        return min(found, key=lambda record: record.gb_per_s)


def spread(record: Record) -> float:
    """(slowest − fastest) / median of the runs."""
    return (max(record.seconds) - min(record.seconds)) / statistics.median(record.seconds)
