"""Stands in for a server of vLLM's where only the pool's decisions are looked at: it does nothing, as long as told."""

from __future__ import annotations

import asyncio
import itertools

from thaw_vllm.errors import ThawError
from thaw_vllm.serve.config import Model
from thaw_vllm.serve.resident import Done, RefusedError


class FakeEngine:
    """Notes what it is asked.

    Attributes:
        seconds: of everything it does.
        faults: what is raised by each work that is named.
        taken: bytes, when it is parked.
        swappable, parkable: its answers; ``swappable`` may be the names of models that take one another's weights.
    """

    pids = itertools.count(1)

    def __init__(self, model: Model, log: list[tuple[str, str]], **given: object) -> None:
        self.model, self.log, self.pid = model, log, next(self.pids)
        self.seconds: float = 0.0
        self.faults: dict[str, ThawError] = {}
        self.swappable: bool | set[str] = False
        self.parkable = False
        self.taken = 0
        self.snapshot: str | None = model.snapshot
        self.stopped = asyncio.Event()
        vars(self).update(given)

    async def _do(self, what: str, model: Model | None = None) -> None:
        self.log.append((what, (model or self.model).name))
        await asyncio.sleep(self.seconds)
        if what in self.faults:
            raise self.faults[what]

    async def start(self) -> None:
        await self._do("start")

    def swaps(self, model: Model) -> bool:
        return self.swappable if isinstance(self.swappable, bool) else {self.model.name, model.name} <= self.swappable

    async def swap(self, model: Model) -> Done:
        await self._do("swap", model)
        self.model = model
        return Done({"fill": 0.1})

    def parks(self) -> bool:
        return self.parkable

    async def park(self) -> Done:
        await self._do("park")
        return Done(host_bytes=self.taken)

    async def wake(self) -> Done:
        await self._do("wake")
        return Done()

    async def stop(self) -> None:
        if not self.stopped.is_set():
            self.log.append(("stop", self.model.name))
            self.stopped.set()

    async def ended(self) -> str:
        await self.stopped.wait()
        return "its server ended with -9"


def refused(why: str) -> ThawError:
    return RefusedError(why)
