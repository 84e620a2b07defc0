"""``thaw bench fork``: a trunk forked into continuations, beside vLLM's own ways, and restored in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ThawError
from . import ceilings, kv
from .outcome import Missed, Outcome, Say
from .record import Record, file_system_of

PREFILLS, PREFIX, FORK, THAWED = "fork-prefills", "fork-prefix", "fork", "fork-thawed"
CHECKPOINT, RESTORE = "checkpoint", "session-restore"
LENGTHS = (4096, 8128)
"""Trunks that are measured unless others are asked for; the longer one, with an answer, fits a model of 8192 tokens."""
WHO = {"fork-keep": "the engine that keeps", "fork-thaw": "the engine that takes up"}


@dataclass(frozen=True)
class Settings(kv.Settings):
    """What is measured: as of ``kv``, whose prompts are the trunks.

    Attributes:
        branches: continuations of each trunk, two at least.
    """

    branches: int


def measure(settings: Settings, say: Say) -> Outcome:
    """The link's limit, an engine that forks and keeps, and a fresh one that takes up and forks.

    Raises:
        StorageError: there is no such model, or no room.
        UsageError: a trunk that is too long, or too short to be cached.
        ThawError: the first engine failed; where the second one does, that is a line.
    """
    planned = kv.plan(settings, say, LENGTHS)
    outcome = Outcome()
    if settings.limits.device != "cpu":
        outcome += ceilings.link("h2d", settings.limits, say)
    with kv.requested(settings, planned, say) as request:
        request["branches"] = settings.branches
        kept = run("fork-keep", request, say)
        try:
            thawed = run("fork-thaw", request, say)
        except ThawError as error:
            thawed = None
            outcome.missed += [Missed(work, "thaw", "", str(error)) for work in (RESTORE, THAWED)]
    for number, tokens in enumerate(planned.tokens):
        about = _About(tokens, settings.branches, planned.route, settings.directory)
        second = None if thawed is None else thawed["lengths"][number]
        outcome.records += about.kept(kept["lengths"][number], second)
        if second is not None:
            outcome.records += about.thawed(kept["lengths"][number], second)
    return outcome


def run(task: str, request: dict[str, Any], say: Say) -> dict[str, Any]:
    """One of this benchmark's engines; see ``kv.ask_engine``."""
    lengths = ", ".join(map(str, request["tokens"]))
    return kv.ask_engine(task, request, WHO[task], f"{request['branches']} continuations of {lengths} tokens", say)


@dataclass(frozen=True)
class _About:
    """What the records of one trunk have in common."""

    tokens: int
    branches: int
    route: str
    directory: Path

    def kept(self, found: dict[str, Any], thawed: dict[str, Any] | None) -> Iterator[Record]:
        """Of the first engine."""
        yield self._asked(PREFILLS, "vllm", found["prefills"])
        yield self._asked(PREFIX, "vllm", found["prefix"], cached=found["prefix"][-1]["cached"])
        same = {"tokens_equal": found["fork"][-1]["tokens"] == found["prefix"][-1]["tokens"]}
        yield self._asked(FORK, "thaw", found["fork"], found["cached"], **same)
        different = None if thawed is None else thawed["different"]
        yield self._moved(CHECKPOINT, found["checkpoint"], found["reports"], None if thawed is None else "", different)

    def thawed(self, kept: dict[str, Any], found: dict[str, Any]) -> Iterator[Record]:
        """Of the second one."""
        wrong = next((_lacking(report) for report in found["reports"] if _lacking(report)), "")
        yield self._moved(RESTORE, found["restore"], found["reports"], wrong, found["different"])
        told = {
            "with_restore": [
                round(restore + asked["seconds"], 6)
                for restore, asked in zip(found["restore"], found["fork"], strict=True)
            ],
            "tokens_equal": found["fork"][-1]["tokens"] == kept["fork"][-1]["tokens"],
        }
        yield self._asked(THAWED, "thaw", found["fork"], kept["cached"], **told)

    def _asked(
        self, work: str, system: str, runs: list[dict[str, Any]], wanted: int | None = None, **told: Any
    ) -> Record:
        """Of first tokens; ``wanted`` of each prompt's tokens must have been cached."""
        extra: dict[str, Any] = {"tokens": self.tokens, "branches": self.branches} | told
        equal = None
        if wanted is not None:
            cached = sorted({count for run in runs for count in run["cached"]})
            extra, equal = extra | {"cached": cached[0]}, cached == [wanted]
            if not equal:
                counts = " or ".join(map(str, cached))
                extra["different"] = f"{counts} tokens of a prompt were cached, not {wanted}"
        seconds = [run["seconds"] for run in runs]
        return Record(work, system, self.route, 0, seconds, "warm", False, equal, None, extra)

    def _moved(
        self, work: str, seconds: list[float], reports: list[dict[str, Any]], wrong: str | None, different: str | None
    ) -> Record:
        """Of a session's blocks; ``wrong`` is None where nothing was compared, empty where nothing was wrong."""
        extra = {
            "tokens": self.tokens,
            "directory": str(self.directory),
            "blocks": reports[-1]["blocks"],
            "phases": kv.phases(reports),
            "first_s": round(seconds[0], 6),
        }
        equal = None if wrong is None else not (wrong or different)
        if equal is False:
            extra["different"] = wrong or different
        size, place, verified = reports[-1]["bytes"], file_system_of(self.directory), work == RESTORE
        return Record(work, "thaw", "store", size, seconds, "warm", verified, equal, None, extra, place)


def _lacking(report: dict[str, Any]) -> str:
    """What of a session a restore into an empty cache did not bring; empty: nothing."""
    missing = {name: report[name] for name in ("present", "left_out", "lost") if report[name]}
    return ", ".join(f"{count} blocks {name.replace('_', ' ')}" for name, count in missing.items())
