"""What the engines of a pool leave to others: room, and who would make some."""

from __future__ import annotations

from collections.abc import Collection

from .changes import Changes
from .config import Model, Settings
from .resident import COMING, Resident, State

TINY = 1e-9
"""Shares are added up as floating point numbers."""


class Room:
    """Asked by ``Pool``, which decides; changes nothing."""

    def __init__(self, changes: Changes, settings: Settings) -> None:
        self._changes, self._settings = changes, settings

    def taken(self) -> float:
        """Shares, together."""
        return sum(one.share for one in self._changes.residents if not one.away)

    def engines(self, model: Model) -> list[Resident]:
        """Those that hold it, or are about to."""
        return [one for one in self._changes.residents if one.model is model and one.state in (State.READY, *COMING)]

    def coming(self, model: Model) -> bool:
        """Whether one is about to hold it."""
        return any(one.state in COMING for one in self.engines(model))

    def ready(self, model: Model) -> list[Resident]:
        """Those that hold it, and that nobody has asked to go."""
        return [one for one in self.engines(model) if one.state is State.READY and not one.unloading]

    def kept(self, one: Resident, claimed: Collection[Resident] = ()) -> bool:
        """Whether it may not make room: it is one of those that are pinned, without those that are about to go."""
        there = sum(other not in claimed for other in self.ready(one.model))
        return one.model.pinned and there <= one.model.least

    def parked_for(self, model: Model, room: float) -> Resident | None:
        """The parked engine used longest ago that may take a model's weights when it is awake, and has room there."""
        found = [
            one
            for one in self._changes.residents
            if one.state is State.PARKED and one.share <= room + TINY and self.may_take(one, model)
        ]
        return min(found, key=lambda one: one.used, default=None)

    def may_take(self, one: Resident, model: Model) -> bool:
        """Whether an engine's weights may be replaced by a model's; a pinned one is not to keep more than its share."""
        fits = one.share >= model.share - TINY and (not model.pinned or one.share <= model.share + TINY)
        return fits and model.name not in one.refused and one.engine.swaps(model)

    def leaving(self) -> list[Resident]:
        """Engines that may make room: those that are about to, then idle ones, then by their last use."""
        ready = [one for one in self._changes.residents if one.state is State.READY and not one.unloading]
        found = [one for one in ready if not self.kept(one)]
        return sorted(found, key=lambda one: (one.leave_by is None, one.inflight > 0, one.used))

    def relieves(self, one: Resident, ready: Collection[Resident]) -> bool:
        """All others are busy, so that it would be started again at once."""
        others = [other for other in ready if other is not one]
        return bool(others) and all(other.inflight >= one.model.busy for other in others)

    def parks(self, one: Resident) -> bool:
        """Rather than stop it."""
        return bool(self._settings.parked) and one.may_park() and one.model.name not in self._changes.too_large

    def expected(self, model: Model) -> float | None:
        """Seconds that this model took to be there the last few times by the way that it will likely take, in the
        median; None: it never took that."""
        other = self.parked_for(model, 1)
        if any(one.model is model and one.state is State.PARKED for one in self._changes.residents):
            return self._median(model, "woken")
        if other is not None:
            swapped, woken = self._median(model, "swapped"), self._median(other.model, "woken")
            return None if swapped is None else swapped + (woken or 0)
        if any(self.may_take(one, model) for one in self.leaving()):
            return self._median(model, "swapped")
        return self._median(model, "started")

    def _median(self, model: Model, way: str) -> float | None:
        took = self._changes.took.get((model.name, way))
        return sorted(took)[len(took) // 2] if took else None
