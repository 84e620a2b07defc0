"""Snapshots verified for the page as ``thaw verify`` does it: one at a time, in a process of its own.

Hashing hundreds of gigabytes beside the router's event loop would slow streams down, and could not be broken off.
As a program (``python -m thaw_vllm.serve.verification FILE PARENT``) this is that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ThawError, UsageError
from .events import Events

KEPT = 100
"""Results that are remembered."""
_EVERY = 0.2
"""Seconds between two lines about how far it is."""
_NICE = 10


class Verification:
    """What is being verified, and what was found."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._running: dict[str, Any] | None = None
        self._results: dict[str, dict[str, Any]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    def begin(self, what: dict[str, str], path: Path) -> None:
        """
        Args:
            what: how requests name the snapshot.

        Raises:
            UsageError: another one is being verified.
        """
        if self._running is not None:
            raise UsageError("another snapshot is being verified; wait for it, or cancel it")
        self._running, self._cancelled = {"what": what, "done": 0, "total": 0}, False
        self._task = asyncio.create_task(self._work(what, path))

    def document(self) -> dict[str, Any]:
        """As plain values: what is running, and the last result for each snapshot."""
        return {"running": self._running, "results": list(self._results.values())}

    async def end(self) -> None:
        """Break off what is running."""
        self._cancelled = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self, what: dict[str, str], path: Path) -> None:
        start, found = time.time(), dict[str, Any]()
        self._events.say("verifying", **what)
        try:
            found = await self._followed(path)
        except (OSError, ValueError) as error:
            found = {"error": f"the process that verifies could not be started, or is not understood: {error}"}
        finally:
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            self._running = self._process = None
        if self._cancelled:
            self._events.say("verification cancelled", **what)
            return
        if not found:
            found = {"error": "the process that verifies has ended without a result; try again"}
        key = json.dumps(what, sort_keys=True)
        self._results.pop(key, None)
        self._results[key] = {"what": what, "time": round(time.time(), 3), **found}
        while len(self._results) > KEPT:
            self._results.pop(next(iter(self._results)))
        seconds = round(time.time() - start, 3)
        if "error" in found:
            self._events.say("verification failed", **what, why=found["error"], seconds=seconds)
        else:
            self._events.say("verified", **what, seconds=seconds)

    async def _followed(self, path: Path) -> dict[str, Any]:
        """What the process says at last; empty where it says nothing."""
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, str(path), str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # keys of a terminal are the pool's
        )
        if self._cancelled:
            process.kill()
        assert process.stdout is not None
        last: dict[str, Any] = {}
        async for line in process.stdout:
            last = json.loads(line)
            if self._running is not None and "done" in last:
                self._running |= last
        await process.wait()
        return {} if "done" in last else last


def main(path: str, parent: str) -> None:
    """Print how far it is, and what was found, in a line of JSON each."""
    from ..kv.verify import verify
    from .lease import end_with

    end_with(int(parent))
    os.nice(_NICE)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            _say({"done": done, "total": total})

    try:
        report = verify(path, progress=progress)
    except ThawError as error:
        _say({"error": str(error)})
        return
    _say(
        {
            "bytes": report.bytes,
            "files": len(report.files),
            "content": report.content,
            "model": report.model,
            "verified": list(report.verified),
            "seconds": round(report.seconds, 3),
        }
    )


def _say(document: dict[str, Any]) -> None:
    os.write(1, json.dumps(document).encode() + b"\n")  # in one piece: threads say how far they are


if __name__ == "__main__":
    main(*sys.argv[1:])
