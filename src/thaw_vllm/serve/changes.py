"""What takes time in a pool: engines that start, swap, park, wake and stop, each in a task of its own.

An engine's new state is set before its task begins, so that whoever decides next sees it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import ThawError
from .config import Model, Settings
from .events import Events
from .resident import BusyEngineError, Done, Engine, RefusedError, Resident, State

REMEMBERED = 9
"""Times of a model's last starts, swaps and wakes."""
BUSY = 60.0
"""Seconds in which an engine that would not swap just now is not asked again."""


class Changes:
    """The engines of a pool.

    Attributes:
        residents: all of them.
        too_large: models whose engines take more host memory, parked, than they may.
        took: by a model's name and the way (started, swapped, woken), seconds until it was there, the last few times.
    """

    def __init__(
        self,
        make: Callable[[Model], Engine],
        events: Events,
        settings: Settings,
        changed: Callable[[], None],
        there: Callable[[Model], None],
        failed: Callable[[Model, str], None],
    ) -> None:
        """
        Args:
            make: a process that is not started yet.
            settings: how many engines may be parked at once, and what they may take.
            changed: called when an engine is in another state.
            there: called with a model that an engine has now.
            failed: called with a model that did not start, and why.
        """
        self.residents: list[Resident] = []
        self.too_large: set[str] = set()
        self.took: dict[tuple[str, str], list[float]] = {}
        self._make, self._events, self._settings = make, events, settings
        self._changed, self._came, self._failed = changed, there, failed
        self._tasks: set[asyncio.Task[None]] = set()

    async def end(self) -> None:
        """Give up what is under way, and stop all engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(one.engine.stop() for one in self.residents), return_exceptions=True)
        self.residents.clear()

    def start(self, model: Model) -> asyncio.Task[None]:
        """A fresh engine."""
        one = Resident(self._make(model), model, model.share)
        self.residents.append(one)
        return self._begin(self._start(one))

    def swap(self, one: Resident, model: Model) -> asyncio.Task[None]:
        """Another model's weights into a ready engine."""
        before, one.model, one.state = one.model, model, State.SWAPPING
        return self._begin(self._swap(one, before))

    def park(self, one: Resident) -> asyncio.Task[None]:
        """A ready engine gives its memory back; where it refuses it is ready again."""
        one.state, one.admitting = State.PARKING, False
        return self._begin(self._park(one))

    def wake(self, one: Resident, model: Model | None = None) -> asyncio.Task[None]:
        """A parked engine takes its memory; and then another model's weights, where one is given."""
        before, one.model = one.model, model or one.model
        one.state, one.away = State.WAKING, False
        return self._begin(self._wake(one, before))

    def stop(self, one: Resident, why: str) -> asyncio.Task[None]:
        """An engine ends."""
        one.state, one.admitting = State.STOPPING, False
        return self._begin(self._stop(one, why))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start(self, one: Resident) -> None:
        start = self._begun(one, "starting")
        try:
            await one.engine.start()
        except Exception as error:
            await self._discard(one)
            self._failed(one.model, _told(error))
            return
        self._begin(self._watch(one))
        self._there(one, "started", start)

    async def _swap(self, one: Resident, before: Model) -> None:
        start = self._begun(one, "swapping", before=before.name)
        try:
            await one.clear()
            done = await one.engine.swap(one.model)
        except RefusedError as error:
            one.refused.add(one.model.name)
            if isinstance(error, BusyEngineError):
                asyncio.get_running_loop().call_later(BUSY, one.refused.discard, one.model.name)
            self._say("swap refused", one, why=str(error))
            one.model = before
            self._ready(one)
        except Exception as error:
            await self._lost(one, f"swapping it to {one.model.name!r} failed: {_told(error)}")
        else:
            self._there(one, "swapped", start, done)

    async def _park(self, one: Resident) -> None:
        start = self._begun(one, "parking")
        try:
            await one.clear()
            done = await one.engine.park()
        except RefusedError as error:
            one.unparkable = str(error)
            self._say("parking refused", one, why=str(error))
            self._ready(one)
        except Exception as error:
            await self._lost(one, f"parking it failed: {_told(error)}")
        else:
            if one.state is State.STOPPING:
                return
            one.state, one.away, one.leave_by, one.unloading = State.PARKED, True, None, False
            one.host_bytes = done.host_bytes
            self._took("parked", one, start, done)
            self._stop_surplus()
            self._changed()

    def _stop_surplus(self) -> None:
        """Of the parked, those used longest ago, until the others are few and small enough."""
        parked = sorted((one for one in self.residents if one.state is State.PARKED), key=lambda one: one.used)
        most, gib = self._settings.parked, self._settings.parked_gib
        for one in [one for one in parked if gib is not None and one.host_bytes > gib * 2**30]:
            parked.remove(one)
            self.too_large.add(one.model.name)
            self.stop(one, f"parked it takes {one.host_bytes / 2**30:.1f} GiB of host memory, more than {gib:g}")
        while parked:
            taken = sum(one.host_bytes for one in parked)
            if len(parked) > most:
                why = f"more than {most} are parked"
            elif gib is not None and taken > gib * 2**30:
                why = f"what is parked takes {taken / 2**30:.1f} GiB of host memory, more than {gib:g}"
            else:
                return
            self.stop(parked.pop(0), why)

    async def _wake(self, one: Resident, before: Model) -> None:
        start = self._begun(one, "waking", model=before.name)
        try:
            done = await one.engine.wake()
        except Exception as error:  # a fresh one can take its place
            await self._lost(one, f"waking it failed: {_told(error)}")
            return
        if before is one.model:
            self._there(one, "woken", start, done)
        elif one.state is not State.STOPPING:  # it has died meanwhile
            self._took("woken", one, start, done, model=before.name)
            one.state = State.SWAPPING
            await self._swap(one, before)

    async def _stop(self, one: Resident, why: str) -> None:
        start = self._begun(one, "stopping", why=why)
        await self._discard(one)
        self._took("stopped", one, start)

    async def _watch(self, one: Resident) -> None:
        why = await one.engine.ended()
        await self._lost(one, why)

    async def _lost(self, one: Resident, why: str) -> None:
        if one.state is not State.STOPPING:
            self._say("lost", one, why=why)
            await self._discard(one)

    async def _discard(self, one: Resident) -> None:
        one.state, one.admitting = State.STOPPING, False
        await one.clear()
        await one.engine.stop()
        if one in self.residents:
            self.residents.remove(one)
        self._changed()

    def _there(self, one: Resident, what: str, start: float, done: Done | None = None) -> None:
        seconds = self._took(what, one, start, done)
        self._came(one.model)
        took = self.took.setdefault((one.model.name, what), [])
        took.append(seconds)
        del took[:-REMEMBERED]
        self._ready(one)

    def _ready(self, one: Resident) -> None:
        if one.state is not State.STOPPING:  # it has died meanwhile
            one.ready()
            self._changed()

    def _begun(self, one: Resident, what: str, **more: Any) -> float:
        self._say(what, one, **more)
        return time.monotonic()

    def _took(self, what: str, one: Resident, start: float, done: Done | None = None, **more: Any) -> float:
        seconds = time.monotonic() - start
        phases = None if done is None else {phase: round(took, 3) for phase, took in done.seconds.items()}
        self._say(what, one, seconds=round(seconds, 3), phases=phases or None, **more)
        return seconds

    def _say(self, what: str, one: Resident, **more: Any) -> None:
        self._events.say(what, **{"model": one.model.name, "engine": one.engine.pid} | more)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ThawError) else f"{type(error).__name__}: {error}"
