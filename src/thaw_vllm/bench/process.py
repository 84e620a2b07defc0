"""The parent's side of a fresh process that measures one thing; ``child`` is the other."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from ..engines.vllm.ending import end_group
from ..errors import ThawError
from ..zygote.processes import has_ended

READY, PREPARED, DONE, RESULT, ERROR = "ready", "prepared", "done", "result", "error"
"""What a child says: imports are made; memory is there; the clock has stopped; the answer; why there is none."""

STARTING, RUNNING = 300.0, 300.0
"""Seconds that imports and the CUDA context, and each later step, may take at most."""
LOOK = 1.0
"""Seconds between looks at whether a child that says nothing is still there."""
COMMAND = (sys.executable, "-m", "thaw_vllm.bench.child")


class ChildError(ThawError):
    """The process failed, took too long or answered with something else; the message is one line for a table."""


class Child:
    """A fresh process, stopped before each step until it is told to go on. A context manager: leaving it kills it."""

    def __init__(self, task: str, request: dict[str, Any], command: Sequence[str] = COMMAND) -> None:
        """Start it; it imports what ``task`` needs and waits.

        Args:
            task: one of ``child.TASKS``.
            request: what is to be done, in JSON's types.
            command: the program, which gets a descriptor for its answers as last argument and the request as a line
                of standard input.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
                # Or what a library said long before comes after the error that ended it.
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            os.close(reading)
            self._log.close()
            raise ChildError(f"could not be started: {error.strerror}") from None
        finally:
            os.close(writing)
        self._answers, self._buffer = reading, b""
        self._say(json.dumps({"task": task, "request": request}))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def reach(self, step: str, timeout: float = RUNNING) -> dict[str, Any]:
        """Wait until the child says that it is at ``step``; returns what it says with it.

        Raises:
            ChildError: it says something else, ends, or takes longer than ``timeout`` seconds.
        """
        line = self._line(time.monotonic() + timeout, timeout)
        try:
            said: dict[str, Any] = json.loads(line)
            kind = said["step"]
        except (ValueError, TypeError, KeyError):
            raise ChildError(f"answered garbage: {line[:80].decode(errors='replace')!r}") from None
        if kind == ERROR:
            raise ChildError(str(said.get("error")))
        if kind != step:
            raise ChildError(f"was to be {step!r} and says {kind!r}")
        return said

    def go(self) -> None:
        """Let it do the next step."""
        self._say("go")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; ``reach`` says why
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _line(self, until: float, timeout: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = until - time.monotonic()
                if left <= 0:
                    raise ChildError(f"took longer than {timeout:.0f} s and was ended{self._last()}")
                if not selector.select(min(left, LOOK)):
                    if self._process.returncode is None:
                        self._end_what_it_left()
                    continue
                more = os.read(self._answers, 1 << 16)
                if not more:
                    self._end_all()
                    code = self._process.returncode
                    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                    raise ChildError(f"ended with {how}{self._last()}")
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end_what_it_left(self) -> None:
        """Processes of a child that has ended may hold the other end of the pipe, so that nobody would be told."""
        if has_ended(self._process.pid):
            self._end_all()

    def _end_all(self, *, at_once: bool = False) -> None:
        """Wait for the child, or end it, and end whatever it left in its process group."""
        if self._process.returncode is not None:
            return
        if not at_once:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        end_group(self._process)

    def printed(self) -> str:
        """The end of what it and its processes printed, up to a mebibyte."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - (1 << 20)))
        return self._log.read().decode(errors="replace")

    def _last(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        """End it with all its processes; a second call does nothing."""
        if self._answers < 0:
            return
        os.close(self._answers)
        self._answers = -1
        self._end_all(at_once=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(task: str, request: dict[str, Any], timeout: float = RUNNING) -> dict[str, Any]:
    """Start a child, let it go through all steps and give its answer.

    Raises:
        ChildError.
    """
    with Child(task, request) as child:
        child.reach(READY, STARTING)
        child.go()
        child.reach(PREPARED, timeout)
        child.go()
        child.reach(DONE, timeout)
        child.go()
        answer: dict[str, Any] = child.reach(RESULT, timeout)["result"]
        return answer
