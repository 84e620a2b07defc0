"""What ``startup`` wrote about a vLLM start, as one report; needs neither vLLM nor torch.

**Self time** of a span is what no span within it covers, in the same process.

**The wall clock** is divided among phases so that their seconds add up to the total: every moment belongs to the
process deepest in the tree that is busy (the others wait for it), of several siblings to the one that was made first,
and within a process to the span that began last. Moments that belong to nobody are ``other``, or ``until the request``
between the last of them and the first token.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import StorageError, UsageError
from ...weights.waterfall import waterfall
from .caches import BROUGHT
from .startup import COMPILED, IMPORTED

FRONT, CORE, WORKER, HELPER = "front", "engine core", "worker", "helper"
FIRST_TOKEN, OTHER, UNTIL_REQUEST = "first token", "other", "until the request"
PHASES = (
    *("process", "imports", "plugin", "helper process", "helper imports", "config", FRONT),
    *("engine process", "engine imports", "engine init"),
    *("worker process", "worker imports", "worker init", "device", "model loading", "model init", "weights"),
    *("freezing", "post-processing", "profile", "compile", "KV cache", "warm-up", "kernel warm-up", "graphs"),
    *(UNTIL_REQUEST, FIRST_TOKEN, OTHER),
)
"""In the order in which a start goes through them."""
_OF_ROLE = {CORE: "engine", WORKER: "worker", HELPER: "helper"}
_LINES = 100_000
"""Of one file; further ones are skipped."""
_TICK = 0.02
"""Seconds by which two notes of when a process was made may differ."""
_KERNELS = 5
"""That a report tells in lines."""
_BEFORE = 60.0
"""Seconds before a start in which what its caches came to may have been noted, by whoever asked for the start."""
HOW = "start vLLM with THAW_START_REPORT naming a directory, as in: THAW_START_REPORT=start/ vllm serve M"


@dataclass(frozen=True)
class Span:
    """A phase of one process; seconds since the start began."""

    phase: str
    begin: float
    end: float
    self_seconds: float


@dataclass(frozen=True)
class Process:
    """One of a start's processes.

    Attributes:
        role: FRONT, CORE, WORKER, or HELPER, of which nothing but its imports is known.
        name: as multiprocessing has it.
        created: seconds since the start began.
        depth: in the tree of processes; 0 is the first.
        spans: in order of their beginning, outer ones first.
        imported: modules, of a process that was forked since then, as far as its last span; they took part of its time.
    """

    pid: int
    parent: int
    role: str
    name: str
    created: float
    depth: int
    spans: tuple[Span, ...]
    imported: tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """A phase on the wall clock.

    Attributes:
        begin, end: of its first and last moment.
        seconds: what of the wall clock is its own.
    """

    name: str
    begin: float
    end: float
    seconds: float


@dataclass(frozen=True)
class StartReport:
    """One start of vLLM.

    Attributes:
        processes: parents before their children.
        phases: in order of their beginning; their seconds add up to ``total``.
        total: seconds from the first process's creation to the first token, or to the last span where none came.
        first_token: whether one came.
        skipped: lines that are no events, and events of other starts in the same directory.
        caches: what became of a file of caches (``caches.Brought``); None where none was named.
        began: of the start, on its machine's clock since that was started (``startup.now``).
        compiled: of each worker that compiles, what it found and what it compiled (``compiled.report``).
    """

    processes: tuple[Process, ...]
    phases: tuple[Phase, ...]
    total: float
    first_token: bool
    skipped: int
    caches: dict[str, Any] | None = None
    began: float = 0.0
    compiled: tuple[dict[str, Any], ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase, in order."""
        return {phase.name: phase.seconds for phase in self.phases}

    def to_json(self) -> dict[str, Any]:
        """As plain values, times to the tenth of a millisecond."""
        return {
            "total": round(self.total, 4),
            "first_token": self.first_token,
            "phases": [
                {"phase": p.name, "begin": round(p.begin, 4), "end": round(p.end, 4), "seconds": round(p.seconds, 4)}
                for p in self.phases
            ],
            "processes": [
                {
                    "pid": process.pid,
                    "parent": process.parent,
                    "role": process.role,
                    "name": process.name,
                    "created": round(process.created, 4),
                    "spans": [
                        {
                            "phase": span.phase,
                            "begin": round(span.begin, 4),
                            "end": round(span.end, 4),
                            "self": round(span.self_seconds, 4),
                        }
                        for span in process.spans
                    ],
                    "imported": list(process.imported),
                }
                for process in self.processes
            ],
            "skipped": self.skipped,
            "caches": self.caches,
            "compiled": list(self.compiled),
        }

    def compiling(self) -> list[str]:
        """What was found compiled and what was not, in lines; empty where nothing is compiled."""
        lines = [] if self.caches is None else [str(self.caches.get("said"))]
        for worker in self.compiled:
            told = worker.get("counts")
            counts = told if isinstance(told, dict) else {}
            loaded, made = counts.get("aot_artifacts_loaded", 0), counts.get("aot_compiles", 0)
            lines.append(f"compiled code: {loaded} parts loaded, {made} compiled")
            parts = _objects(worker.get("parts"))
            lines += [f"  {one['why']}" for one in parts if one.get("why")]
            if made and not any(one.get("why") for one in parts):
                lines.append("  what was found could not be loaded; vLLM's log says why")
            kernels = _objects(worker.get("kernels"))
            lines.append(f"kernels of Triton: {len(kernels)} compiled")
            lines += [f"  {one.get('name')}: {one.get('why')}" for one in kernels[:_KERNELS]]
            lines += [f"  and {len(kernels) - _KERNELS} more"] if len(kernels) > _KERNELS else []
        return lines

    def waterfall(self, width: int = 40) -> str:
        """One line a phase."""
        return waterfall(self.seconds | {"total": self.total}, width)

    def html(self) -> str:
        """A page of its own with a chart."""
        from .start_page import page

        return page(self)


@dataclass(frozen=True)
class Event:
    """One line of a file, times as written."""

    pid: int
    parent: int
    name: str
    created: float
    phase: str
    begin: float
    end: float


def read(directory: str | os.PathLike[str]) -> StartReport:
    """The last start that was written to a directory.

    Raises:
        StorageError: there is no such directory.
        UsageError: there is no start in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise StorageError(f"there is no directory {str(path)!r}; {HOW}")
    events: list[Event] = []
    skipped = 0
    for file in sorted(path.glob("*.jsonl")):
        found, torn = _events(file)
        events += found
        skipped += torn
    if not events:
        raise UsageError(f"{str(path)!r} holds no report of a start; {HOW}")
    whole = report(events, skipped, dict(filter(None, map(_imported, sorted(path.glob(f"*{IMPORTED}"))))))
    mine = {(process.pid, process.created + whole.began) for process in whole.processes}
    compiled = []
    for file in sorted(path.glob(f"*{COMPILED}")):
        told, pid = _object(file) or {}, file.name.removesuffix(COMPILED)
        at = told.pop("created", None)
        if isinstance(at, int | float) and any(str(p) == pid and abs(made - at) < _TICK for p, made in mine):
            compiled.append(told)
    return replace(whole, caches=_brought(path / BROUGHT, whole), compiled=tuple(compiled))


def _brought(file: Path, report: StartReport) -> dict[str, Any] | None:
    """What became of a file of caches, unless it is of another start in the same directory."""
    found = _object(file)
    at = None if found is None else found.pop("at", None)
    begun = report.began
    in_time = isinstance(at, int | float) and begun - _BEFORE <= at <= begun + report.total
    return found if in_time else None


def _objects(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _object(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _imported(file: Path) -> tuple[tuple[int, float], tuple[str, ...]] | None:
    """What a process says of its imports, by its pid and creation; None where it is not that."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        process = int(file.name.removesuffix(IMPORTED)), float(given["created"])
        names = tuple(name for name in given["modules"] if isinstance(name, str))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return process, names[:_LINES]


def _events(file: Path) -> tuple[list[Event], int]:
    """Of a file named for a process: its events, and how many lines are something else."""
    found: list[Event] = []
    skipped = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            event = _event(line) if number < _LINES else None
            if event is None or str(event.pid) != file.stem:
                skipped += 1
            else:
                found.append(event)
    return found, skipped


def _event(line: str) -> Event | None:
    try:
        given = json.loads(line)
        event = Event(
            pid=int(given["pid"]),
            parent=int(given["parent"]),
            name=str(given["name"]),
            created=float(given["created"]),
            phase=str(given["phase"]),
            begin=float(given["begin"]),
            end=float(given["end"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # torn, or somebody else's
        return None
    times = (event.created, event.begin, event.end)
    if not all(map(math.isfinite, times)) or not 0 <= event.begin <= event.end or max(map(abs, times)) > 1e12:
        return None
    return event


def report(
    events: Sequence[Event], skipped: int = 0, imported: Mapping[tuple[int, float], tuple[str, ...]] | None = None
) -> StartReport:
    """The last start among events, of which there must be some.

    Args:
        skipped: lines that were none.
        imported: modules, by a process's pid and creation.

    Processes belong together by their parents. A process is its pid and its creation, since pids come again.
    """
    by_process: dict[tuple[int, float], list[Event]] = {}
    for event in events:
        by_process.setdefault((event.pid, event.created), []).append(event)
    parents = {key: _parent(key, found[0].parent, by_process) for key, found in by_process.items()}
    roots = [key for key, parent in parents.items() if parent is None] or [min(parents)]
    fronts = [key for key in roots if _role(by_process[key]) == FRONT]
    root = max(fronts or roots, key=lambda key: (key[1], key[0]))
    chosen = _tree(root, parents)
    skipped += sum(len(found) for key, found in by_process.items() if key not in chosen)
    zero = root[1]
    tokens = [e.end for key in chosen for e in by_process[key] if e.phase == FIRST_TOKEN]
    end = min(tokens) if tokens else max(e.end for key in chosen for e in by_process[key])
    processes = tuple(
        _process(key, depth, by_process[key], key == root, zero, end - zero, (imported or {}).get(key, ()))
        for key, depth in chosen.items()
    )
    phases = tuple(_wall(processes, end - zero))
    return StartReport(processes, phases, end - zero, bool(tokens), skipped, began=zero)


def _parent(
    key: tuple[int, float], pid: int, by_process: dict[tuple[int, float], list[Event]]
) -> tuple[int, float] | None:
    """The process with that pid that was there when ``key`` was made; the last of them."""
    found = [other for other in by_process if other[0] == pid and other[1] <= key[1] and other != key]
    return max(found, key=lambda other: other[1], default=None)


def _tree(root: tuple[int, float], parents: dict[tuple[int, float], Any]) -> dict[tuple[int, float], int]:
    """Process to depth, parents before their children, older before younger."""
    depths = {root: 0}
    for key in sorted(parents, key=lambda key: (key[1], key[0])) * 2:  # twice: within a tick, a child may come first
        if key not in depths and parents[key] in depths:
            depths[key] = depths[parents[key]] + 1
    return depths


def _role(events: Iterable[Event]) -> str:
    phases = {event.phase for event in events}
    for role, telling in (
        (FRONT, {"config", "front", "engine process"}),
        (CORE, {"engine init", "worker process"}),
        (WORKER, {"worker init", "device", "model loading"}),
    ):
        if phases & telling:
            return role
    return HELPER


def _process(
    key: tuple[int, float],
    depth: int,
    events: Sequence[Event],
    is_root: bool,
    zero: float,
    total: float,
    imported: tuple[str, ...],
) -> Process:
    role = _role(events)
    role = FRONT if is_root and role == HELPER else role
    prefix = _OF_ROLE.get(role)
    named = []
    for event in sorted(events, key=lambda e: (e.begin, -e.end)):
        begin, end = (min(max(time - zero, 0.0), total) for time in (event.begin, event.end))
        if event.begin - zero <= total:
            own = prefix is not None and event.phase in ("process", "imports")
            named.append((f"{prefix} {event.phase}" if own else event.phase, begin, end))
    seconds = [0.0] * len(named)
    for index, begin, end in _innermost([(begin, end, (-begin, end)) for _, begin, end in named]):
        seconds[index] += end - begin
    spans = tuple(Span(*span, own) for span, own in zip(named, seconds, strict=True))
    return Process(key[0], events[0].parent, role, events[0].name, max(0.0, key[1] - zero), depth, spans, imported)


def _innermost(spans: Sequence[tuple[float, float, tuple[float, ...]]]) -> Iterator[tuple[int, float, float]]:
    """Pieces (index of a span, begin, end) of the time that spans cover, each of the span with the least rank then.

    Args:
        spans: begin, end, rank; in any order.
    """
    times = sorted({time for begin, end, _ in spans for time in (begin, end)})
    coming = sorted(range(len(spans)), key=lambda index: spans[index][0], reverse=True)
    active: list[tuple[tuple[float, ...], int]] = []
    for begin, end in itertools.pairwise(times):
        while coming and spans[coming[-1]][0] <= begin:
            index = coming.pop()
            heapq.heappush(active, (spans[index][2], index))
        while active and spans[active[0][1]][1] <= begin:
            heapq.heappop(active)
        if active:
            yield active[0][1], begin, end


def _wall(processes: Sequence[Process], total: float) -> Iterator[Phase]:
    every = [(span, process, order) for order, process in enumerate(processes) for span in process.spans]
    ranked = [(s.begin, s.end, (-float(p.depth), float(order), -s.begin, s.end)) for s, p, order in every]
    pieces = [(every[index][0].phase, begin, end) for index, begin, end in _innermost(ranked)]
    tokens = min((begin for name, begin, _ in pieces if name == FIRST_TOKEN), default=None)
    filled: list[tuple[str, float, float]] = []
    last = 0.0
    for name, begin, end in [*pieces, ("", total, total)]:
        if begin > last:
            filled.append((UNTIL_REQUEST if begin == tokens else OTHER, last, begin))
        if name:
            filled.append((name, begin, end))
        last = max(last, end)
    by_name: dict[str, list[tuple[float, float]]] = {}
    for name, begin, end in filled:
        by_name.setdefault(name, []).append((begin, end))
    for name, found in by_name.items():
        yield Phase(name, found[0][0], found[-1][1], sum(end - begin for begin, end in found))
