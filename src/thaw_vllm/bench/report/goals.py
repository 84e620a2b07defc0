"""What thaw is meant to reach, held against what was recorded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..outcome import Outcome
from ..record import Record
from ..summary import alone, of_limit, of_rival, prompt_tokens
from .results import Run

FULL = 15 * 10**9
"""Bytes from which on a run says something about the goals."""
FULL_PREFIX, FULL_PAGES = 8000, 10**9
"""The same of a prompt: its tokens, and the bytes of their pages."""
FULL_RANK = 20 * 10**9
"""Bytes of one of several ranks up to which a run does: larger ones are measured for how a restore grows."""
NEXT_SIZE = 9000
"""Tokens from which on a time says nothing about the goal for 8k."""
LARGEST, ALL_SIZES = "max_cudagraph_capture_size", 512
"""vLLM's own choice on GPUs of 70 GB and more."""
ZYGOTE, ZYGOTE_PRESET = "snapshot-zygote", "snapshot-zygote-fast-start"
NEW_MACHINE, NEW_ZYGOTE, NEW_PRESET = "checkpoint", "checkpoint-zygote", "checkpoint-zygote-fast-start"
RANKS_RESTORED = tuple(f"tp{ranks}-restore" for ranks in range(2, 65))
ONE_SHOT = ("restore-tmpfs", "restore-pagecache", "restore-disk")

Value = Callable[[Record, Outcome], "float | None"]


def peak(record: Record, outcome: Outcome) -> float | None:
    """MiB."""
    return record.peak_host_mib


def speed(record: Record, outcome: Outcome) -> float | None:
    """GB/s of original bytes."""
    return record.gb_per_s


def seconds(record: Record, outcome: Outcome) -> float | None:
    """Median."""
    return record.median


def seconds_by_preset(record: Record, outcome: Outcome) -> float | None:
    """Median, unless graphs were chosen by engine arguments."""
    return None if _graphs_chosen(record) else record.median


def seconds_with_all_sizes(record: Record, outcome: Outcome) -> float | None:
    """Median, of graphs for all of vLLM's sizes: its own choice, or the preset's overruled by vLLM's largest one."""
    wanted = {LARGEST: ALL_SIZES} if record.route == ZYGOTE_PRESET else {}
    return record.median if _graphs_chosen(record) == wanted else None


def _graphs_chosen(record: Record) -> dict[str, Any]:
    """The engine arguments that choose sizes of graphs."""
    given: dict[str, Any] = record.extra.get("engine_args", {})
    return {name: value for name, value in given.items() if "cudagraph" in name or "compilation" in name}


def seconds_with_graphs(record: Record, outcome: Outcome) -> float | None:
    """Median, of an engine with CUDA graphs."""
    return record.median if record.extra.get("start") == "graphs" else None


def parked_with_graphs(record: Record, outcome: Outcome) -> float | None:
    """The same, of an engine that held as much of the GPU as a model of full size takes."""
    return seconds_with_graphs(record, outcome) if _held(record, "used") >= FULL / 2**20 else None


def given_back(record: Record, outcome: Outcome) -> float | None:
    """Share of the GPU's memory in use before parking that is not in use meanwhile, at least."""
    used, left = _held(record, "used"), [one for one in record.extra.get("left") or [] if one is not None]
    return 1 - max(left) / used if left and used >= FULL / 2**20 else None


def beside_the_driver(record: Record, outcome: Outcome) -> float | None:
    """Seconds from waking to the first token without the driver's own share, median; of an engine with CUDA graphs."""
    driver: list[float] = record.extra.get("phases", {}).get("driver", [])
    if seconds_with_graphs(record, outcome) is None or len(driver) != len(record.seconds):
        return None
    return statistics.median(whole - part for whole, part in zip(record.seconds, driver, strict=True))


def _held(record: Record, name: str) -> float:
    """MiB on the GPU, the least of the runs; 0 where nobody told."""
    told: list[float | None] = record.extra.get(name) or [None]
    return min((0.0 if one is None else one for one in told), default=0.0)


def prefix_seconds(record: Record, outcome: Outcome) -> float | None:
    """Median, of an 8k prefix."""
    return record.median if prompt_tokens(record) < NEXT_SIZE else None


def round_of_one_copy(record: Record, outcome: Outcome) -> float | None:
    """Median seconds of a fork pool's rounds, where its engines share their weights."""
    return prefix_seconds(record, outcome) if record.extra.get("shared") else None


def cold_over_thawed(record: Record, outcome: Outcome) -> float | None:
    """The cold prompt's seconds to the first token over those of the thawed one of the same length, of an 8k prefix."""
    tokens = prompt_tokens(record)
    cold = [r.median for r in outcome.records if r.work == "ttft-cold" and prompt_tokens(r) == tokens]
    return cold[0] / record.median if cold and tokens < NEXT_SIZE else None


def several_ranks(record: Record) -> bool:
    """Whether it is of several ranks, which say nothing about a goal for one GPU."""
    given: dict[str, Any] = record.extra.get("engine_args", {})
    sizes = (given.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data"))
    return record.extra.get("ranks", 1) > 1 or any(size != 1 for size in sizes)


def share_of_each(record: Record, outcome: Outcome) -> float | None:
    """Speed of one of several GPUs that are filled from tmpfs at once, over that of one alone in the same run."""
    one = alone(record, outcome)
    if one is None or record.extra.get("medium") != "tmpfs" or one.bytes > FULL_RANK:
        return None
    ranks: int = record.extra["ranks"]
    return record.gb_per_s / ranks / one.gb_per_s


def of_one_read(record: Record, outcome: Outcome) -> float | None:
    """Seconds of one read for several GPUs over those of one for one."""
    told: float | None = record.extra.get("ratio")
    one = alone(record, outcome)
    return told if one is None else record.median / one.median


def of_plain_copy(record: Record, outcome: Outcome) -> float | None:
    """Speed over that of a plain copy between the same two GPUs."""
    copies = (one.gb_per_s for one in outcome.records if (one.work, one.route) == ("d2d", record.route))
    limit: float | None = record.extra.get("copy_limit_gb_per_s") or next(copies, None)
    return None if limit is None else record.gb_per_s / limit


def full_size(record: Record, outcome: Outcome) -> bool:
    """Whether it says something about the goals: a model by its bytes, a prompt by its tokens and their pages."""
    tokens = prompt_tokens(record)
    if not tokens:
        return record.bytes >= FULL
    same = (other.bytes for other in outcome.records if prompt_tokens(other) == tokens)
    return tokens >= FULL_PREFIX and max(same) >= FULL_PAGES


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        text: what is to be reached.
        works: where it is looked for.
        verified: which of thaw's two records counts; None for both.
        value: of a record, None where it cannot be told.
        bound: the value to reach; to stay below when ``at_most``.
        at_most: see ``bound``.
        unit: follows the figure.
        routes: which routes count; none for all.
        digits: of the figure, behind the point.
        any_size: whether a small model says as much.
        any_ranks: whether several ranks say as much.
    """

    text: str
    works: tuple[str, ...]
    verified: bool | None
    value: Value
    bound: float
    at_most: bool = False
    unit: str = ""
    routes: tuple[str, ...] = ()
    digits: int = 2
    any_size: bool = False
    any_ranks: bool = False

    def reached(self, runs: Sequence[Run]) -> tuple[str, str]:
        """Figure and verdict by the latest full run that tells; the worst record of it counts, none of other bytes."""
        for run in runs:
            found = [
                value
                for record in run.outcome.records
                if record.system == "thaw" and record.work in self.works and record.equal is not False
                if self.any_size or full_size(record, run.outcome)
                if self.any_ranks or not several_ranks(record)
                if self.verified in (None, record.verified) and (not self.routes or record.route in self.routes)
                if (value := self.value(record, run.outcome)) is not None
            ]
            if found:
                worst = max(found) if self.at_most else min(found)
                met = worst <= self.bound if self.at_most else worst >= self.bound
                return f"{worst:.{self.digits}f}{self.unit} ({run.date[:10]})", "reached" if met else "**missed**"
        return "–", "not measured"

    @property
    def goal(self) -> str:
        """The bound as it is written."""
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.unit}"


def _start(text: str, work: str, bound: float, value: Value, *routes: str, any_size: bool = False) -> Goal:
    """At most so many seconds, from a snapshot, warm."""
    return Goal(text, (work,), None, value, bound, at_most=True, unit=" s", routes=routes, any_size=any_size)


GOALS = (
    Goal("restore from tmpfs, verified: of the h2d limit", ("restore-tmpfs",), True, of_limit, 0.90),
    Goal("restore from tmpfs, unverified: of the h2d limit", ("restore-tmpfs",), False, of_limit, 0.95),
    Goal("restore from tmpfs, verified: of the best rival", ("restore-tmpfs",), True, of_rival, 1.6, unit=" ×"),
    Goal("restore from the page cache, verified: of the h2d limit", ("restore-pagecache",), True, of_limit, 0.85),
    Goal("restore from disk, cold, verified: of the direct-read limit", ("restore-disk",), True, of_limit, 0.98),
    Goal("warm restore, verified: of the h2d limit", ("restore-warm",), True, of_limit, 0.97),
    Goal(
        "restore from tmpfs, compressed, verified: of the h2d limit",
        ("restore-tmpfs-compressed",),
        True,
        of_limit,
        1.25,
    ),
    Goal(
        "the same in a process that expects it",
        ("restore-tmpfs-compressed-expected",),
        True,
        of_limit,
        1.25,
    ),
    Goal(
        "restore from disk, compressed, cold: of the direct-read limit",
        ("restore-disk-compressed",),
        True,
        of_limit,
        1.42,
    ),
    Goal("freeze to tmpfs: of the slower of link and parallel writes", ("freeze-tmpfs",), None, of_limit, 0.9),
    Goal("freeze to disk: of the slower of link and parallel writes", ("freeze-disk",), None, of_limit, 0.9),
    Goal("freeze to tmpfs, compressed", ("freeze-tmpfs-compressed",), None, speed, 8, unit=" GB/s"),
    Goal("host memory while restoring, at most", ONE_SHOT, None, peak, 512, at_most=True, unit=" MiB"),
    Goal(
        *("vLLM's load_weights from a snapshot on tmpfs, 16 GB", ("vllm-load-weights",), None, seconds, 0.6),
        at_most=True,
        unit=" s",
        routes=("snapshot",),
    ),
    Goal(
        *("KV restore of an 8k-token prefix (1 GiB)", ("kv-restore",), None, prefix_seconds, 0.040),
        at_most=True,
        unit=" s",
        digits=3,
    ),
    Goal("KV restore: of the h2d limit", ("kv-restore",), None, of_limit, 0.8),
    Goal(
        *("a session's restore of an 8k-token trunk (about 1 GiB)", ("session-restore",), None, prefix_seconds, 0.050),
        at_most=True,
        unit=" s",
        digits=3,
    ),
    Goal(
        *("a fork pool's round of 4 × 64 tokens, trunks of up to 8k", ("fork-pool",), None, round_of_one_copy, 0.6),
        at_most=True,
        unit=" s",
    ),
    Goal("first token: cold over thawed at 8k tokens", ("ttft-thawed",), None, cold_over_thawed, 10, unit=" ×"),
    _start("first token in a fork of a zygote, eager, 16 GB", "start-eager", 3.5, seconds, ZYGOTE, ZYGOTE_PRESET),
    _start(
        *("the same with CUDA graphs of vLLM's sizes", "start-graphs", 8, seconds_with_all_sizes),
        *(ZYGOTE, ZYGOTE_PRESET),
    ),
    _start("the same with the preset's four sizes", "start-graphs", 6, seconds_by_preset, ZYGOTE_PRESET),
    _start(
        *("with empty caches but those of a file, graphs of vLLM's sizes, 16 GB", "start-new-machine", 35, seconds),
        NEW_MACHINE,
    ),
    _start("the same in a fork of a zygote", "start-new-machine", 8, seconds, NEW_ZYGOTE),
    _start("the same with the preset's four sizes", "start-new-machine", 8, seconds, NEW_PRESET),
    _start(
        *("vLLM's server healthy in a fork of a zygote, on a CPU", "server-healthy-cpu", 5, seconds, ZYGOTE),
        any_size=True,
    ),
    _start("other weights in place, 16 GB on tmpfs, to the first token", "swap", 1.0, seconds_with_graphs, "tmpfs"),
    _start("the same from page-locked memory", "swap", 0.6, seconds_with_graphs, "page-locked"),
    _start("parking an engine of 16 GB", "park", 2.5, parked_with_graphs, "driver", any_size=True),
    Goal(
        *("of the GPU's memory, given back by it", ("park",), None, given_back, 0.99),
        routes=("driver",),
        digits=4,
        any_size=True,
    ),
    _start("waking it, to the first token, beside the driver's own share", "wake", 0.4, beside_the_driver, "driver"),
    Goal(
        "ranks of 8 to 16 GB restored from tmpfs at once, each: of one alone",
        RANKS_RESTORED,
        True,
        share_of_each,
        0.9,
        any_ranks=True,
    ),
    Goal(
        "weights from another GPU over NVLink, all counted: of a plain copy", ("peer-nvlink",), True, of_plain_copy, 0.9
    ),
    Goal(
        *("one read for several GPUs: of one read for one", ("broadcast",), True, of_one_read, 1.15),
        at_most=True,
        unit=" ×",
        any_ranks=True,
    ),
)
