"""What is kept of starts that ``cold_start`` has measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..engines.vllm import start_report
from .record import Record, file_system_of

if TYPE_CHECKING:
    from .cold_start import Loader, Settings

LOAD = "vllm-load-weights"
_BEFORE_FIRST_TOKEN = ("process", "imports", "caches", "engine", "first_token")


def records(
    work: str,
    loader: Loader,
    answers: Sequence[dict[str, Any]],
    size: int,
    settings: Settings,
    reference: Any,
    *,
    itself: bool,
) -> Iterator[Record]:
    """Of one loader's starts.

    Args:
        reference: outputs that its own should equal.
        itself: whether those are its own.
    """
    asked = [answer["seconds"] for answer in answers]
    equal: bool | None = all(_tokens(answer["outputs"]) == _tokens(reference) for answer in answers)
    if equal and itself:
        equal = None  # to itself, which says little
    verified = bool(answers[-1]["reports"]) and answers[-1]["reports"][0].get("verified", "none") != "none"
    place = file_system_of(loader.snapshot or settings.model)
    told = {name: [round(s[name], 3) for s in asked if name in s] for name in asked[-1]}
    extra: dict[str, Any] = {
        "phases": _phases(answers) or told,
        "asked": told,
        "engine_args": settings.engine_args,
        "logprobs_equal": all(answer["outputs"] == reference for answer in answers),
    }
    if any(any(answer.get("compiled") or []) for answer in answers):
        extra["compiled"] = [answer["compiled"] for answer in answers]
    starts = [sum(s.get(name, 0.0) for name in _BEFORE_FIRST_TOKEN) for s in asked]
    yield Record(work, loader.system, loader.route, size, starts, "warm", verified, equal, None, extra, place)
    loads = [s["weights"] for s in asked if "weights" in s]
    if loads:
        mode = {"start": work}
        yield Record(LOAD, loader.system, loader.route, size, loads, "warm", verified, equal, None, mode, place)


def _phases(answers: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of the wall clock by phase, a list of all runs each; empty where a start has no report."""
    if not all("report" in answer for answer in answers):
        return {}
    runs = [answer["report"].seconds for answer in answers]
    names = {name for seconds in runs for name in seconds}
    ordered = [name for name in start_report.PHASES if name in names] + sorted(names - set(start_report.PHASES))
    return {name: [round(seconds.get(name, 0.0), 4) for seconds in runs] for name in ordered}


def _tokens(outputs: Any) -> list[list[int]]:
    return [output["tokens"] for output in outputs]
