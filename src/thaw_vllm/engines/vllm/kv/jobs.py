"""Freezes in the background: what they hold until the workers have ended them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ....kv.table import Table
from ....weights.waterfall import Phases
from .. import versions
from ..answers import all_raised

PAUSE = 0.02
"""Seconds between two questions about a job."""


@dataclass
class Job:
    """A freeze; ``answers`` once the workers have ended theirs and nobody has asked yet."""

    held: list[Any]
    path: str
    table: Table
    skipped: dict[str, int]
    phases: Phases
    answers: list[dict[str, Any]] = field(default_factory=list)

    def report(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``core.freeze`` gives."""
        reports = all_raised(answers)
        leaves = self.table.leaves()
        self.phases.add(slowest(reports), "workers")
        return {
            "path": self.path,
            "bytes": sum(report["bytes"] for report in reports),
            "kept": sum(report["kept"] for report in reports),
            "blocks": len(self.table.blocks),
            "prefixes": len(leaves),
            "tokens": self.table.depths()[leaves[0]] * self.table.block_size,
            "skipped": self.skipped,
            "files": [report["path"] for report in reports],
            "seconds": self.phases.total,
            "phases": self.phases.seconds,
        }


def slowest(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The phases of the rank that took longest."""
    found: list[dict[str, float]] = [answer["phases"] for answer in answers]
    return max(found, key=lambda phases: sum(phases.values()))


def jobs(core: Any) -> dict[str, Job]:
    """An engine core's, by id."""
    found: dict[str, Job] | None = getattr(core, "_thaw_jobs", None)
    if found is None:
        found = core._thaw_jobs = {}
    return found


def look(core: Any, name: str, *, keep: bool = False) -> dict[str, Any]:
    """Ask the workers about a job and let go of its blocks when they have ended; ``keep`` leaves the report there."""
    found = jobs(core)[name]
    if not found.answers:
        answers = core.model_executor.collective_rpc("thaw_kv_job", args=({"job": name},))
        if any("running" in answer for answer in answers):
            return {"job": name}
        found.answers = answers
        held, found.held = found.held, []
        versions.block_pool(core).free_blocks(reversed(held))
    if keep:
        return {"job": name}
    del jobs(core)[name]
    return found.report(found.answers)


def settle(core: Any) -> None:
    """Wait for freezes in the background: their blocks are in use, which a reset would answer with a refusal."""
    while any(not found.answers for found in jobs(core).values()):
        reap(core)
        time.sleep(PAUSE)


def reap(core: Any) -> None:
    """Let go of what freezes hold that have ended, whether or not anybody asks about them."""
    for name, found in jobs(core).items():
        if not found.answers:
            look(core, name, keep=True)
