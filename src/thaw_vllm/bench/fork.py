"""``thaw bench fork``: a trunk forked into continuations, beside vLLM's own ways, restored in a fresh process, and in a
fork pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StorageError, ThawError
from . import ceilings, kv
from .fork_task import POOL_BRANCHES, POOL_TOKENS
from .outcome import Missed, Outcome, Say
from .record import Record, file_system_of

PREFILLS, PREFIX, FORK, THAWED = "fork-prefills", "fork-prefix", "fork", "fork-thawed"
CHECKPOINT, RESTORE, POOL = "checkpoint", "session-restore", "fork-pool"
LENGTHS = (4096, 8128)
"""Trunks that are measured unless others are asked for; the longer one, with an answer, fits a model of 8192 tokens."""
WHO = {"fork-keep": "the engine that keeps", "fork-thaw": "the engine that takes up", "fork-pool": "the fork pool"}


@dataclass(frozen=True)
class Settings(kv.Settings):
    """What is measured: as of ``kv``, whose prompts are the trunks.

    Attributes:
        branches: continuations of each trunk, two at least.
        snapshot: of the model, whose weights the engines of a fork pool share; None: no pool is measured.
        workers: engines of it, ``POOL_BRANCHES`` at most.
    """

    branches: int
    snapshot: Path | None = None
    workers: int = 2


def measure(settings: Settings, say: Say) -> Outcome:
    """The link's limit, an engine that forks and keeps, a fresh one that takes up and forks, and a pool.

    Raises:
        StorageError: there is no such model or snapshot, or no room.
        UsageError: a trunk that is too long, or too short to be cached.
        ThawError: the first engine failed; where the second one or the pool does, that is a line.
    """
    if settings.snapshot is not None and not settings.snapshot.is_file():
        raise StorageError(f"there is no snapshot {str(settings.snapshot)!r}")
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
        pooled = _pooled(settings, request, outcome, say)
    for number, tokens in enumerate(planned.tokens):
        about = _About(tokens, settings.branches, planned.route, settings.directory)
        second = None if thawed is None else thawed["lengths"][number]
        outcome.records += about.kept(kept["lengths"][number], second)
        if second is not None:
            outcome.records += about.thawed(kept["lengths"][number], second)
        if pooled is not None:
            outcome.records.append(about.pooled(pooled["lengths"][number], pooled, settings.workers))
    return outcome


def _pooled(settings: Settings, request: dict[str, Any], outcome: Outcome, say: Say) -> dict[str, Any] | None:
    if settings.snapshot is None:
        return None
    more = {"snapshot": str(settings.snapshot), "workers": settings.workers, "branches": POOL_BRANCHES}
    try:
        return run("fork-pool", request | more, say)
    except ThawError as error:
        outcome.missed.append(Missed(POOL, "thaw", "", str(error)))
        return None


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

    def pooled(self, found: dict[str, Any], pool: dict[str, Any], workers: int) -> Record:
        """Of the pool's rounds."""
        extra: dict[str, Any] = {"tokens": self.tokens, "branches": POOL_BRANCHES, "length": POOL_TOKENS}
        extra |= {"workers": workers, "shared": pool["shared"], "gpu_mib": pool["mib"]}
        extra["first_s"] = round(found["first"], 6)
        extra["tokens_equal"] = all(made == found["tokens"][0] for made in found["tokens"])
        return Record(POOL, "thaw", self.route, 0, found["round"], "warm", False, None, None, extra)

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
