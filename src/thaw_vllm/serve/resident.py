"""An engine of a pool, what it can be asked, and how that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import ThawError
from .config import Model


class State(str, enum.Enum):
    """What an engine is doing."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    PARKING = "parking"
    PARKED = "parked"
    WAKING = "waking"
    STOPPING = "stopping"


COMING = (State.STARTING, State.SWAPPING, State.WAKING)
GOING = (State.PARKING, State.STOPPING)


class UnknownModelError(ThawError):
    """There is no model of that name."""


class UnavailableError(ThawError):
    """Not now; ``retry_after`` seconds from now it may be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CutError(UnavailableError):
    """A request had to go before it was answered: its engine is wanted for something else, or has died."""


class RefusedError(ThawError):
    """An engine would not do this, and is as it was."""


class BusyEngineError(RefusedError):
    """It would not just now."""


@dataclass(frozen=True)
class Done:
    """What an engine tells of a change.

    Attributes:
        seconds: by phase.
        host_bytes: memory of the host that its processes have then, where it was parked.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    host_bytes: int = 0


class Engine(Protocol):
    """One server process of vLLM's; ``engine.py`` has the real one.

    What fails with anything but RefusedError leaves an engine that is to be stopped.
    """

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""

    @property
    def snapshot(self) -> str | None:
        """That its weights are from; None where there is none."""

    async def start(self) -> None:
        """Come up with its model.

        Raises:
            ThawError: it did not.
        """

    def swaps(self, model: Model) -> bool:
        """Whether it may be worth asking it to take this model's weights."""

    async def swap(self, model: Model) -> Done:
        """Take another model's weights in place; it has no requests.

        Raises:
            RefusedError: it goes on with what it has.
            ThawError: it failed.
        """

    def parks(self) -> bool:
        """Whether it may be worth asking it to give its memory back."""

    async def park(self) -> Done:
        """Give the memory back, and keep the process; it has no requests.

        Raises:
            RefusedError: it goes on.
            ThawError: it failed.
        """

    async def wake(self) -> Done:
        """Take the memory again.

        Raises:
            ThawError: it failed.
        """

    async def stop(self) -> None:
        """End the process and all that it started; never fails."""

    async def ended(self) -> str:
        """Wait until the process has ended; why it has."""


@dataclass(eq=False)
class Resident:
    """An engine of the pool.

    Attributes:
        engine: the process.
        model: what it holds, or is about to.
        share: of the memory, as it was started with.
        state: what it is doing.
        away: its memory is given back.
        host_bytes: that it took when it was parked last.
        inflight: requests that it has.
        used: when the last one came or ended, by ``time.monotonic``.
        admitting: false while it is to make room.
        leave_by: when it makes room at the latest; None while it need not.
        unloading: somebody has asked for it to go.
        tasks: those that have its requests.
        cut: those of them that were told to give up.
        refused: names of models that it would not swap to.
        unparkable: why it would not be parked.
    """

    engine: Engine
    model: Model
    share: float
    state: State = State.STARTING
    away: bool = False
    host_bytes: int = 0
    inflight: int = 0
    used: float = field(default_factory=time.monotonic)
    admitting: bool = True
    leave_by: float | None = None
    unloading: bool = False
    refused: set[str] = field(default_factory=set)
    unparkable: str | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    cut: set[asyncio.Task[Any]] = field(default_factory=set)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """One request, in the task that calls this.

        Raises:
            CutError: the engine is given something else to do.
        """
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self.cut:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            raise CutError(f"the engine of {self.model.name!r} had to go; send the request again", 1) from None
        finally:
            self.tasks.discard(task)
            self.cut.discard(task)

    async def clear(self) -> None:
        """Have whatever has its requests give up; returns when all have."""
        while self.tasks:
            for task in self.tasks - self.cut:
                self.cut.add(task)
                task.cancel()
            await asyncio.wait(set(self.tasks), timeout=1)

    def may_park(self) -> bool:
        """Whether parking it is wanted, and has not been refused."""
        return self.model.park and self.unparkable is None and self.engine.parks()

    def ready(self) -> None:
        """It takes requests again."""
        self.state, self.admitting, self.leave_by, self.used = State.READY, True, None, time.monotonic()
