"""vLLM's client of an engine whose sessions are as ``tests.sessions.made`` has them: its files are real, it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.sessions.made import MODEL, SIZE, context, payload

from thaw_vllm.sessions import blocks
from thaw_vllm.sessions.blocks import Name
from thaw_vllm.sessions.store import Store

RUNNING = [*range(40, 51)]
"""Tokens of the running request ``cmpl-1``, six of which were given."""


class Client:
    """Has all whole blocks of whatever it is asked.

    Attributes:
        asked: methods and options.
        source: where its tokenizer is.
        fault: the error that it answers with.
        meanwhile: called before it answers.
    """

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.source = "/models/secret place/tiny"
        self.fault: dict[str, str] | None = None
        self.asleep = False
        self.meanwhile: Callable[[], Any] = lambda: asyncio.sleep(0)

    async def is_sleeping(self) -> bool:
        return self.asleep

    async def _call(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((method, options))
        await self.meanwhile()
        if self.fault is not None:
            return self.fault
        return {"thaw_session_keep": keep, "thaw_session_restore": restore}[method](options, self.source)


def keep(options: dict[str, Any], source: str) -> dict[str, Any]:
    """As the engine core's."""
    running, own = options.get("request") is not None, context()
    tokens, salt = (RUNNING, "own") if running else (options["tokens"], options["salt"])
    count, directory = len(tokens) // SIZE, Store(options["store"]).blocks
    added = 0
    for address in own.addresses(tokens, salt, count):
        name = Name(address, 0)
        added += blocks.write(directory, name, memoryview(payload(name, own.page)))
    return {
        "tokens": tokens,
        "salt": salt,
        "prompt": 6 if running else None,
        "sampling": {"seed": 7} if running else None,
        "model": MODEL,
        "block_size": SIZE,
        "blocks": count,
        "kept": [0],
        "contexts": [own.to_json()],
        "source": source,
        "writer": "a test",
        "added": added,
        "bytes": added * own.page,
        "seconds": 0.25,
        "phases": {"workers": 0.25},
    }


def restore(options: dict[str, Any], source: str) -> dict[str, Any]:
    """Likewise."""
    store = Store(options["store"])
    session = store.read(options["session"])
    names = [*store.names(session)]
    for own, name in names:
        blocks.read(store.blocks, name, memoryview(bytearray(own.page)))
    return {
        "blocks": len(names),
        "present": 0,
        "left_out": 0,
        "rebuilds": False,
        "lost": 0,
        "prefixes": 1,
        "tokens": session.head.blocks * SIZE,
        "bytes": sum(own.page for own, _ in names),
        "seconds": 0.5,
        "phases": {"workers": 0.5},
    }
