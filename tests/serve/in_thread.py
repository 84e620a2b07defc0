"""A pool in a thread of its own, for tests that drive a browser in theirs."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.serve.served import TOKEN, Served


class InThread:
    """Starts and stops it.

    Attributes:
        served: the pool that runs, or ran last.
    """

    def __init__(self, served: Served, port: int = 0) -> None:
        self.served = served
        self._began, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(port)), daemon=True)
        self._thread.start()
        assert self._began.wait(30), "the server does not start"

    async def _run(self, port: int) -> None:
        self._loop = asyncio.get_running_loop()
        async with self.served.running(port):
            self._began.set()
            await self._stop.wait()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
        assert not self._thread.is_alive()

    def soon(self, work: Any, *given: Any) -> None:
        """Call this in its loop."""
        self._loop.call_soon_threadsafe(work, *given)

    def post(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        request = urllib.request.Request(
            f"{self.served.url}{path}",
            json.dumps(body or {}).encode(),
            {"Content-Type": "application/json", "X-Thaw-Admin-Token": TOKEN},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()

    def post_soon(self, path: str, body: Any = None) -> threading.Thread:
        """The same in the background, whatever the answer."""

        def work() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.post(path, body)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread


@contextlib.contextmanager
def in_thread(served: Served, port: int = 0) -> Iterator[InThread]:
    running = InThread(served, port)
    try:
        yield running
    finally:
        running.stop()
