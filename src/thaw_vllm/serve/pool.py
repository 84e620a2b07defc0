"""Which model is where: requests wait until an engine holds theirs, and engines change for those that wait longest.

One event loop, no threads: whatever is decided is decided in ``_schedule``, which does not wait. What takes time is in
``changes.py`` and ends in another ``_schedule``.

Models get room in the order in which their first request came. What has to go for them lets nobody in any more, and
goes when its requests have ended, at the latest when ``drain`` has passed: no model waits behind an endless stream of
requests for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from ..errors import UsageError
from .changes import Changes
from .config import Model, Settings
from .events import Events
from .failures import Failures
from .resident import COMING, GOING, Engine, Resident, State, UnavailableError, UnknownModelError
from .room import TINY, Room

TICK = 0.5
"""Seconds between looks at what has been idle."""
_LATE = 0.002
"""Seconds; timers of some event loops are a millisecond early."""


@dataclass(eq=False)
class _Waiter:
    model: Model
    future: asyncio.Future[Resident]


class Pool:
    """The engines of one machine, and who waits for them.

    Attributes:
        models: by name.
        events: what happens.
    """

    def __init__(self, settings: Settings, make: Callable[[Model], Engine], events: Events | None = None) -> None:
        """
        Args:
            make: an engine for a model, not started yet.
        """
        self.models: dict[str, Model] = dict(settings.models)
        self.events = events or Events()
        self._settings = settings
        self._changes = Changes(make, self.events, settings, self._kick, self._note_there, self._note_failure)
        self._room = Room(self._changes, settings)
        self._queue: list[_Waiter] = []
        self._failures = Failures()
        self._wanted: dict[str, None] = {}
        self._scheduled = self._closed = False

    @property
    def residents(self) -> list[Resident]:
        """All engines."""
        return self._changes.residents

    @property
    def waiting(self) -> dict[str, int]:
        """Requests that wait, by model."""
        found: dict[str, int] = {}
        for waiter in self._queue:
            found[waiter.model.name] = found.get(waiter.model.name, 0) + 1
        return found

    def snapshot(self, name: str) -> str | None:
        """Of a model: the one that is configured, or that its engine has found or made."""
        held = (one for one in self.residents if one.model.name == name and one.state not in COMING)
        found = (one.engine.snapshot for one in held)
        return self.models[name].snapshot or next(filter(None, found), None)

    def failure(self, name: str) -> str | None:
        """Why a model did not start the last time; None where it did."""
        failed = self._failures.last(name)
        return None if failed is None else failed.why

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Pool]:
        """Start what is pinned, look after what is idle; at the end all engines are stopped."""
        ticking = asyncio.create_task(self._tick())
        self._kick()
        try:
            yield self
        finally:
            self.close()
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await self._changes.end()

    def close(self) -> None:
        """Take no more requests; those that wait are told so, and who follows the events is let go."""
        self._closed = True
        for waiter in self._queue:
            if not waiter.future.done():
                waiter.future.set_exception(UnavailableError("the server is being stopped", 5))
        self._queue.clear()
        self.events.end()

    def register(self, model: Model) -> None:
        """Serve one more model.

        Raises:
            UsageError: there is one of that name, or there is no room for it beside those that are pinned.
        """
        if model.name in self.models:
            raise UsageError(f"there is a model {model.name!r} already")
        models = self.models | {model.name: model}
        Settings(models)
        self.models = models
        self.events.say("registered", model=model.name)
        self._kick()

    @contextlib.asynccontextmanager
    async def lease(self, name: str, deadline: float | None = None) -> AsyncIterator[Resident]:
        """An engine that holds a model, for one request.

        Args:
            deadline: seconds to wait at most; None: the model's.

        Raises:
            UnknownModelError: there is no such model.
            UnavailableError: not by then, or it does not start; CutError: the engine had to go meanwhile.
        """
        model = self._known(name)
        limit = model.deadline if deadline is None else min(deadline, model.deadline)
        one = await self._acquire(model, limit)
        try:
            with one.request():
                yield one
        finally:
            self._release(one)

    async def load(self, name: str) -> None:
        """Have a model there, however long it takes.

        Raises:
            UnknownModelError: there is no such model.
            UnavailableError: it does not start.
        """
        self._release(await self._acquire(self._known(name), math.inf))

    async def unload(self, name: str, *, park: bool = False, deadline: float | None = None) -> None:
        """Let a model's requests end, and then stop or park its engines.

        Args:
            park: park them; one that cannot be parked goes on.
            deadline: seconds in which the requests may end; None: the pool's ``drain``.

        Raises:
            UnknownModelError: there is no such model.
            UsageError: it is pinned, is not there, or cannot be parked.
        """
        model = self._known(name)
        if model.least:
            why = "pinned" if model.pinned else f"to have {model.minimum} engines (minimum)"
            raise UsageError(f"the model {name!r} is {why}; it stays until the server is stopped")
        if park and not self._settings.parked:
            raise UsageError(f"the model {name!r} cannot be parked: this server parks none (parked = 0)")
        states = (State.READY,) if park else (State.READY, State.PARKED)
        found = [one for one in self.residents if one.model is model and one.state in states]
        if not found:
            raise UsageError(f"the model {name!r} is not there")
        for one in found:
            one.admitting, one.unloading = False, True
        limit = time.monotonic() + (self._settings.drain if deadline is None else deadline)
        refused = None
        try:
            while any(one.inflight and one in self.residents for one in found) and time.monotonic() < limit:
                await asyncio.sleep(0.02)
            for one in found:
                if one.state in states and one.model is model and one in self.residents:
                    await (self._changes.park(one) if park else self._changes.stop(one, "it was asked for"))
                    refused = refused or (one.unparkable if park else None)
        finally:
            for one in found:
                one.unloading = False
            self._kick()
        if refused is not None:
            raise UsageError(f"the model {name!r} cannot be parked: {refused}")

    def expected(self, model: Model) -> float | None:
        """As of ``Room``."""
        return self._room.expected(model)

    # Waiting

    def _known(self, name: str) -> Model:
        model = self.models.get(name)
        if model is None:
            raise UnknownModelError(f"there is no model {name!r}")
        return model

    async def _acquire(self, model: Model, limit: float) -> Resident:
        if self._closed:
            raise UnavailableError("the server is being stopped", 5)
        there = self._holding(model)
        if there is not None and not any(waiter.model is model for waiter in self._queue):
            return self._granted(there)
        if there is None:
            self._require_hope(model, limit)
        waiter = _Waiter(model, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self._kick()
        try:
            await asyncio.wait({waiter.future}, timeout=None if limit == math.inf else limit)
        except asyncio.CancelledError:
            if waiter.future.done() and waiter.future.exception() is None:
                self._release(waiter.future.result())
            raise
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._kick()
        if waiter.future.done():
            return waiter.future.result()
        raise UnavailableError(f"the model {model.name!r} was not there within {limit:g} s", self.expected(model) or 1)

    def _require_hope(self, model: Model, limit: float) -> None:
        """Raises:
        UnavailableError: waiting so long would be in vain.
        """
        if self._room.coming(model):
            return
        failed = self._failures.resting(model.name)
        if failed is not None and not self._room.engines(model):
            raise UnavailableError(failed.why, failed.pause)
        expected = self.expected(model)
        if expected is not None and expected > limit:
            self._wanted[model.name] = None  # it is there for those who come later
            self._kick()
            raise UnavailableError(
                f"the model {model.name!r} takes some {expected:.1f} s to be there; the request may wait {limit:g} s",
                expected,
            )

    def _granted(self, one: Resident) -> Resident:
        one.inflight += 1
        if one.inflight >= one.model.busy:
            self._kick()
        one.used = time.monotonic()
        return one

    def _release(self, one: Resident) -> None:
        one.inflight -= 1
        one.used = time.monotonic()
        self._kick()

    def _note_there(self, model: Model) -> None:
        self._failures.forget(model.name)

    def _note_failure(self, model: Model, why: str) -> None:
        failed = self._failures.note(model.name, why)
        pause = failed.pause
        self.events.say("failed", model=model.name, why=why, again_in=round(pause, 1))
        if not self._room.engines(model):  # else another of its engines answers
            for waiter in [waiter for waiter in self._queue if waiter.model is model]:
                self._queue.remove(waiter)
                if not waiter.future.done():
                    waiter.future.set_exception(UnavailableError(failed.why, pause))
        asyncio.get_running_loop().call_later(pause + _LATE, self._kick)

    # Deciding

    def _kick(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._schedule)

    def _schedule(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        claimed: set[Resident] = set()
        blocked = False
        ready = [one for one in self.residents if one.state is State.READY and not one.unloading]
        for one in ready:
            one.admitting = True  # unless somebody still needs its room
        for model in self._in_turn():
            there = self._holding(model)
            if there is not None:
                self._wanted.pop(model.name, None)
                for waiter in [waiter for waiter in self._queue if waiter.model is model]:
                    self._queue.remove(waiter)
                    if not waiter.future.done():
                        waiter.future.set_result(self._granted(self._holding(model) or there))
            elif not blocked and self._may_bring(model):
                blocked = not self._bring(model, claimed)  # others wait for the room that is being made
        if not blocked:
            self._grow()
        self._shrink()
        for one in ready:
            if one not in claimed:
                one.leave_by = None

    def _in_turn(self) -> Iterator[Model]:
        """Models that are wanted, pinned ones first, then by who has waited longest."""
        seen = set()
        pinned = (model for model in self.models.values() if model.pinned)
        wanted = (self.models[name] for name in self._wanted)
        for model in [*pinned, *(waiter.model for waiter in self._queue), *wanted]:
            if model.name not in seen:
                seen.add(model.name)
                yield model

    def _may_bring(self, model: Model) -> bool:
        """Nothing of it is coming, and its last start did not fail just now."""
        return not self._room.coming(model) and self._failures.resting(model.name) is None

    def _bring(self, model: Model, claimed: set[Resident]) -> bool:
        """Begin to have a model there, the quickest way first: where there is room woken, in a parked engine of another
        model, or fresh; else in place of another's weights. False where others have to go first.

        Args:
            claimed: takes those.
        """
        if self._bring_in_free_room(model):
            return True
        now, taken = time.monotonic(), self._room.taken()
        leaving = self._room.leaving()
        for one in leaving:
            if self._room.may_take(one, model):
                if self._gone(one, now):
                    self._changes.swap(one, model)
                    return True
                claimed.add(one)
                return False
        lacking = (
            taken + model.share - 1 - sum(one.share for one in self.residents if one.state in GOING and not one.away)
        )
        for one in leaving:
            if lacking <= TINY:
                break
            if self._room.kept(one, claimed):  # of several pinned ones others go already
                continue
            lacking -= one.share
            claimed.add(one)
            if self._gone(one, now):
                self._evict(one)
        return False

    def _bring_in_free_room(self, model: Model, *, others: bool = True) -> bool:
        """Whether that is begun.

        Args:
            others: an engine that is parked for another model may be taken.
        """
        taken = self._room.taken()
        parked = next((one for one in self.residents if one.model is model and one.state is State.PARKED), None)
        if parked is not None and taken + parked.share <= 1 + TINY:
            self._changes.wake(parked)
            return True
        other = self._room.parked_for(model, 1 - taken) if others and parked is None else None
        if other is not None:
            self._changes.wake(other, model)
            return True
        if taken + model.share <= 1 + TINY:
            self._changes.start(model)
            return True
        return False

    def _grow(self) -> None:
        """In room that nobody else waits for: models that have fewer engines than their minimum, and those that are
        busy."""
        for model in self.models.values():
            there = self._room.engines(model)
            busy = bool(there) and all(one.state is State.READY and one.inflight >= model.busy for one in there)
            lacks = len(there) < model.least or (busy and len(there) < model.maximum)
            if lacks and self._failures.resting(model.name) is None:
                self._bring_in_free_room(model, others=False)

    def _shrink(self) -> None:
        """An engine that was to take another model, and refused, may be one too many of the one that it kept."""
        for model in self.models.values():
            ready = self._room.ready(model)
            for one in [one for one in ready if not one.inflight][: max(0, len(ready) - model.maximum)]:
                self._evict(one)

    def _gone(self, one: Resident, now: float) -> bool:
        """Let nobody in any more; whether its requests have ended, or have had their time."""
        one.admitting = False
        if one.leave_by is None:
            one.leave_by = now + self._settings.drain
            if one.inflight:
                asyncio.get_running_loop().call_later(self._settings.drain + _LATE, self._kick)
        return not one.inflight or now >= one.leave_by - TINY

    def _evict(self, one: Resident) -> None:
        if self._room.parks(one):
            self._changes.park(one)
        else:
            self._changes.stop(one, "another model needs the room")

    def _holding(self, model: Model) -> Resident | None:
        found = [one for one in self.residents if one.model is model and one.state is State.READY and one.admitting]
        return min(found, key=lambda one: one.inflight, default=None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._kick()
            now = time.monotonic()
            for one in list(self.residents):
                model, idle = one.model, now - one.used
                if one.inflight or one.unloading or one.state not in (State.READY, State.PARKED):
                    continue
                ready = self._room.ready(model)
                if one.state is State.READY and (len(ready) <= model.least or self._room.relieves(one, ready)):
                    continue
                stops = model.idle_stop is not None and idle >= model.idle_stop
                parks = model.idle_park is not None and idle >= model.idle_park and one.state is State.READY
                if stops:
                    self._changes.stop(one, f"nothing was asked for {idle:.0f} s")
                elif parks and self._room.parks(one):
                    self._changes.park(one)
