"""What engines have computed: tokens, and prefixes found in their caches; out of their own metrics."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .metrics import engine_metrics
from .pool import Pool
from .resident import State

COUNTED = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}
"""Samples of vLLM's, and what they are called here: tokens, but for the last, which is a part of 1."""
FRESH = 1.0
"""Seconds for which an answer is given again: however many look, engines are asked once."""


class Usage:
    """Of a pool's engines."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._lock = pool, asyncio.Lock()
        self._last: dict[str, Any] = {}
        self._until = 0.0

    async def document(self) -> dict[str, Any]:
        """Since each engine was started, by engine: pages subtract one answer from the next."""
        async with self._lock:
            if time.monotonic() >= self._until:
                self._last = await self._read()
                self._until = time.monotonic() + FRESH
        return self._last

    async def _read(self) -> dict[str, Any]:
        ready = [(one, one.model.name) for one in self._pool.residents if one.state is State.READY]
        texts = await asyncio.gather(*(engine_metrics(one) for one, _ in ready))
        engines = [
            {"model": name, "engine": one.engine.pid} | read(text)
            for (one, name), text in zip(ready, texts, strict=True)
        ]
        return {"time": round(time.time(), 3), "engines": engines}


def read(text: str) -> dict[str, float]:
    """What an exposition counts, summed over its labels; what it lacks is left out."""
    names = tuple(COUNTED)
    found: dict[str, float] = {}
    lines = "\n".join(line for line in text.splitlines() if line.startswith(names))  # the rest is not worth parsing
    try:
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                if sample.name in COUNTED and math.isfinite(sample.value):  # JSON has no other numbers
                    name = COUNTED[sample.name]
                    found[name] = found.get(name, 0.0) + sample.value
    except ValueError:
        return {}
    return found
