"""A process of a fork pool, and the connection over which it is asked and answers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from ....errors import BrokenEngineError, ThawError, named
from ....zygote import messages
from ..ending import end_group
from ..fresh import endpoints, last_error, python

POLL = 0.25
"""Seconds in which it is noticed that a process has ended, and that a pool is to."""
CLOSED = "the fork pool was closed"


class Child:
    """A program that runs in a session of its own, connects to a socket and reads and writes messages; or none."""

    def __init__(self, what: str, closing: threading.Event) -> None:
        """
        Args:
            what: it is, for errors.
            closing: set when nothing is to be begun any more.
        """
        self._what, self._closing = what, closing
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._log, self._printed = Path(), 0

    @property
    def pid(self) -> int | None:
        """None: it does not run."""
        process = self._process
        return None if process is None or _ended(process) else process.pid

    def start(self, program: str, *, path: Path, log: Path, until: float, zygote: str | None) -> None:
        """Have it run and connected.

        Args:
            program: a module, that gets the socket's path.
            path: of the socket.
            log: where what it prints is added.
            until: when it has to have connected (``time.monotonic``).
            zygote: whose fork it shall be; None: it is started anew.

        Raises:
            ThawError, OSError: it did not start.
            BrokenEngineError: the pool was closed meanwhile.
        """
        self.require_open()
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(os.fspath(path))
            listening.listen(1)
            listening.settimeout(POLL)
            with log.open("ab") as stream:
                self._log, self._printed = log, stream.tell()
                self._process = subprocess.Popen(
                    [*python(zygote), "-m", program, os.fspath(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | endpoints(os.fspath(path.parent)),
                    start_new_session=True,  # Ctrl-C is the pool's, which ends them all
                )
            self._connection = self._accepted(listening, until)
        path.unlink()
        self.require_open()  # after which ``interrupt`` finds the connection

    def asked(self, message: dict[str, Any], until: float) -> dict[str, Any]:
        """What it says to a message, in its first moments.

        Raises:
            TimeoutError: nothing in time.
            ThawError: it cannot do that, of the class that it names; or it has ended.
        """
        self.send(message)
        answer = self.told(until)
        if answer is None:
            self.require_open()
            raise ThawError(f"{self._what} ended: {self._why()}")
        if "failed" in answer:
            found = error_of(answer)
            raise found if type(found) is not ThawError else ThawError(self._why() or str(found))
        return answer

    def told(self, until: float) -> dict[str, Any] | None:
        """Its next message; None where it has ended.

        One that was sent by then counts, however late this thread comes to take it.

        Raises:
            TimeoutError: none was.
        """
        assert self._connection is not None
        self._connection.settimeout(max(0.001, until - time.monotonic()))
        found = messages.receive(self._connection)
        if found is None:
            return None
        message, _ = found
        if message.pop("at") > until:  # it is here only because this thread was held up
            raise TimeoutError
        return message

    def send(self, message: dict[str, Any], seconds: float | None = None) -> None:
        """Ask it; within so many seconds, which a full socket may take."""
        assert self._connection is not None
        if seconds is not None:
            self._connection.settimeout(max(0.001, seconds))
        messages.send(self._connection, message)

    def interrupt(self) -> None:
        """Have whoever waits for it see that the pool is closing."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def require_open(self) -> None:
        """Raises:
        BrokenEngineError: the pool is closing.
        """
        if self._closing.is_set():
            raise BrokenEngineError(CLOSED)

    def end(self) -> None:
        """End it and all that it has started; where none runs, nothing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # reaped by somebody else
                end_group(self._process)
            self._process = None

    def _accepted(self, listening: socket.socket, until: float) -> socket.socket:
        assert self._process is not None
        while True:
            with contextlib.suppress(TimeoutError):
                return listening.accept()[0]
            self.require_open()
            if _ended(self._process):
                raise ThawError(f"{self._what} ended: {self._why()}")
            if time.monotonic() > until:
                raise TimeoutError

    def _why(self) -> str:
        """The last error that it printed."""
        with self._log.open("rb") as stream:
            stream.seek(self._printed)
            return last_error(stream.read().decode(errors="replace"))


def tell(pool: socket.socket, message: dict[str, Any]) -> None:
    """Send it to the pool, with the time: by a clock that all processes of a machine have in common."""
    messages.send(pool, message | {"at": time.monotonic()})


def spelt(error: Exception) -> dict[str, str]:
    """An exception for ``error_of``, in another process."""
    own = isinstance(error, ThawError)
    return {"failed": type(error).__name__, "message": str(error) if own else f"{type(error).__name__}: {error}"}


def error_of(told: dict[str, Any]) -> ThawError:
    """The exception that was ``spelt``; a ThawError where it is none of thaw's."""
    return (named(told["failed"]) or ThawError)(told["message"])


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, since ``end_group`` wants to be the one that does."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True
