"""What happens in a pool, for those who watch it: the last events, and whoever follows them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("thaw.serve")

KEPT = 1000
_BEHIND = 256
"""Events that a slow follower may be behind; it misses the oldest then."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        number: counts from 1.
        time: by ``time.time()``.
        what: in a word or two.
        more: the model and the engine's pid, seconds, the reason.
    """

    number: int
    time: float
    what: str
    more: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {"number": self.number, "time": round(self.time, 3), "event": self.what} | self.more


class Events:
    """Said in one event loop.

    Attributes:
        last: the last ones, oldest first.
        listeners: called with each.
    """

    def __init__(self) -> None:
        self.last: deque[Event] = deque(maxlen=KEPT)
        self._count = itertools.count(1)
        self.listeners: list[Callable[[Event], None]] = []
        self._followers: set[asyncio.Queue[Event | None]] = set()
        self._ended = False

    def say(self, what: str, **more: Any) -> None:
        """Note it, log it, and tell all followers."""
        event = Event(next(self._count), time.time(), what, {k: v for k, v in more.items() if v is not None})
        self.last.append(event)
        logger.info("%s %s", what, " ".join(f"{name}={value!r}" for name, value in event.more.items()))
        for listener in self.listeners:
            listener(event)
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def end(self) -> None:
        """Let all followers go."""
        self._ended = True
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Events as they happen.

        Args:
            after: first those that are kept and came after this one; None: none of them.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_BEHIND)
        self._followers.add(queue)
        try:
            seen = after
            if after is not None:
                for kept in list(self.last):
                    if kept.number > after:
                        seen = kept.number
                        yield kept
            while not self._ended:
                event = await queue.get()
                if event is None:
                    return
                if seen is None or event.number > seen:
                    yield event
        finally:
            self._followers.discard(queue)
