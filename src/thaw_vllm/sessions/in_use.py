"""A store's lock, for a task of an event loop: whoever waits for ``thaw gc`` lets the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import ParamSpec, TypeVar

from .store import Store

PAUSE = 0.1
"""Seconds until the lock is tried again. No thread waits for it: a repair may take hours, and threads are few."""

P = ParamSpec("P")
T = TypeVar("T")


class Use:
    """``Store.use`` for a task, and for what works for it; the last of them lets it go.

    So a task that is cancelled does not leave the lock behind, nor take it from an engine that still writes, or from a
    thread that still publishes.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._mutex = store, threading.Lock()
        self._users, self._held = 1, contextlib.ExitStack()

    async def thread(self, work: Callable[P, T], *given: P.args, **options: P.kwargs) -> T:
        """What comes of ``work`` in a thread, which has the lock until it ends."""
        return await asyncio.to_thread(self._work, lambda: work(*given, **options))

    async def outliving(self, work: Awaitable[T]) -> T:
        """What comes of ``work``, which goes on, and has the lock until it ends, where this task is cancelled."""
        going = asyncio.ensure_future(work)
        with self._mutex:
            self._users += 1
        going.add_done_callback(lambda _: self._leave())
        return await asyncio.shield(going)

    def _work(self, work: Callable[[], T]) -> T:
        with self._mutex:
            if not self._users:
                raise asyncio.CancelledError  # before a thread was free; nobody waits for this
            self._users += 1
        try:
            return work()
        finally:
            self._leave()

    def _take(self) -> bool:
        held = self._store.try_use()
        if held is None:
            return False
        self._held = held
        return True

    def _leave(self) -> None:
        with self._mutex:
            self._users -= 1
            last = not self._users
        if last:
            self._held.close()


@contextlib.asynccontextmanager
async def in_use(store: Store) -> AsyncIterator[Use]:
    """Nobody removes blocks of a store meanwhile. Waits for whoever does; the event loop goes on.

    Raises:
        StorageError: its lock cannot be taken.
    """
    use = Use(store)
    try:
        while not await use.thread(use._take):
            await asyncio.sleep(PAUSE)
        yield use
    finally:
        use._leave()
