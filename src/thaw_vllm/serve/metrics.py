"""Prometheus metrics of a pool: every engine's own with a label that says whose they are, and the pool's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from .engine import ServerEngine
from .events import Event
from .pool import Pool
from .resident import Resident, State

LABELS = ("thaw_model", "thaw_engine")
"""The model that an engine holds now, and its process; vLLM's own ``model_name`` stays what it was started with."""
PHASE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30)
BUCKETS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 15, 30, 60, 120, 300)
"""Seconds."""
CHANGES = ("started", "swapped", "woken", "parked", "stopped")
FAILURES = ("failed", "lost", "swap refused", "parking refused")
_PATIENCE = 5.0
"""Seconds for an engine to answer."""


class Counted:
    """What has happened since the pool was started, out of its events."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._seconds = Histogram(
            *("thaw_change_seconds", "Starts, swaps, wakes, parks and stops of engines"),
            labelnames=["model", "change"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._phases = Histogram(
            *("thaw_change_phase_seconds", "The same, by phase, as far as engines tell"),
            labelnames=["model", "change", "phase"],
            buckets=PHASE_BUCKETS,
            registry=self.registry,
        )
        self._failures = Counter(
            *("thaw_failures", "Starts that failed, engines that were lost, refusals"),
            labelnames=["model", "kind"],
            registry=self.registry,
        )

    def note(self, event: Event) -> None:
        """One event."""
        model = str(event.more.get("model"))
        if event.what in CHANGES and "seconds" in event.more:
            self._seconds.labels(model, event.what).observe(event.more["seconds"])
            for phase, seconds in event.more.get("phases", {}).items():
                self._phases.labels(model, event.what, phase).observe(seconds)
        if event.what in FAILURES:
            self._failures.labels(model, event.what).inc()


async def exposition(pool: Pool, counted: Counted, starts: Iterable[Mapping[str, Any]]) -> tuple[bytes, str]:
    """All metrics, and their media type.

    Args:
        starts: the last ones, as ``Starts`` has them, the latest first.
    """
    ready = [one for one in pool.residents if one.state is State.READY]
    texts = await asyncio.gather(*map(engine_metrics, ready))
    families = [*_own(pool), _last_starts(starts), *_merged(zip(ready, texts, strict=True))]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(families))
    return generate_latest(registry) + generate_latest(counted.registry), CONTENT_TYPE_LATEST


class _Given:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


async def engine_metrics(one: Resident) -> str:
    """An engine's own exposition; empty where it gives none."""
    session = cast(ServerEngine, one.engine).session
    if session is None:
        return ""
    try:
        async with session.get("http://engine/metrics", timeout=aiohttp.ClientTimeout(total=_PATIENCE)) as answer:
            return await answer.text() if answer.status == 200 else ""
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, RuntimeError, UnicodeDecodeError):
        return ""  # it has gone meanwhile


def _merged(found: Iterable[tuple[Resident, str]]) -> Iterator[Metric]:
    families: dict[str, Metric] = {}
    for one, text in found:
        labels = dict(zip(LABELS, (one.model.name, str(one.engine.pid)), strict=True))
        try:
            parsed = list(text_string_to_metric_families(text))
        except ValueError:
            continue  # the others' are told all the same
        for family in parsed:
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.add_sample(sample.name, sample.labels | labels, sample.value, sample.timestamp)
    yield from families.values()


def _last_starts(starts: Iterable[Mapping[str, Any]]) -> Metric:
    found = GaugeMetricFamily(
        "thaw_start_phase_seconds", "Of a model's last start, by phase; phases overlap", labels=["model", "phase"]
    )
    last: dict[str, Mapping[str, Any]] = {}
    for start in starts:
        last.setdefault(start["model"], start)
    for model, start in last.items():
        sums: dict[str, float] = {}
        for one in start.get("phases", ()):
            sums[one["phase"]] = sums.get(one["phase"], 0) + one["seconds"]
        for phase, seconds in sums.items():
            found.add_metric([model, phase], seconds)
    return found


def _own(pool: Pool) -> Iterator[Any]:
    engines = GaugeMetricFamily("thaw_engines", "Engines by model and state", labels=["model", "state"])
    requests = GaugeMetricFamily("thaw_requests", "Requests that engines have", labels=["model"])
    counts: dict[tuple[str, str], int] = {}
    running: dict[str, int] = dict.fromkeys(pool.models, 0)
    for one in pool.residents:
        key = one.model.name, one.state.value
        counts[key] = counts.get(key, 0) + 1
        running[one.model.name] = running.get(one.model.name, 0) + one.inflight
    for (model, state), count in counts.items():
        engines.add_metric([model, state], count)
    for model, count in running.items():
        requests.add_metric([model], count)
    waiting = GaugeMetricFamily("thaw_waiting_requests", "Requests that wait for their model", labels=["model"])
    queued = pool.waiting
    for model in pool.models:
        waiting.add_metric([model], queued.get(model, 0))
    parked = GaugeMetricFamily(
        "thaw_parked_host_bytes", "Memory of the host that parked engines have taken", labels=["model"]
    )
    held = dict.fromkeys(pool.models, 0)
    for one in pool.residents:
        if one.away:
            held[one.model.name] = held.get(one.model.name, 0) + one.host_bytes
    for model, count in held.items():
        parked.add_metric([model], count)
    yield from (engines, requests, waiting, parked)
