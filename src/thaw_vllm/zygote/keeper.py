"""One process a program: it is the parent of all that the program starts, and outlives them, so that none is left."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import traceback
from typing import Any, NoReturn

from ..errors import ThawError
from . import messages, processes

GRACE = 10.0
"""Seconds between asking and killing."""
_AGAIN = 0.05
"""Seconds after which a client that may not have stopped yet is looked at again."""


def keep(connection: socket.socket, files: list[int], *, detached: bool) -> None:
    """Fork the program, which gets ``files``, and keep it. Returns in the program only; this process ends here.

    This process becomes the leader of a session without a terminal, so that no file the program opens becomes its
    terminal. The program leads a process group in it. As long as the program runs, signals that ``connection`` brings
    are passed on. When the client has gone, and is not ``detached``, the program is ended; when the program has ended,
    so is everything that it left.
    """
    os.setsid()
    processes.adopt_orphans()
    asked: list[int] = []
    read, write = processes.woken_by_signals()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    me = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # in the program, until it has its own handlers
    program = os.fork()
    if not program:
        signal.set_wakeup_fd(-1)
        os.setpgid(0, 0)
        processes.die_with(me)
        messages.close((read, write))
        connection.close()
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    messages.close(files)
    with contextlib.suppress(OSError):  # whoever of the two comes first
        os.setpgid(program, program)
    try:
        Keeper(connection, program, read, asked, detached=detached).run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class Keeper:
    """Waits for whatever happens first.

    Args:
        program: its process id.
        wake: a pipe that has bytes when a signal came to this process.
        asked: signals that ask this process to end the program.
    """

    def __init__(self, connection: socket.socket, program: int, wake: int, asked: list[int], *, detached: bool) -> None:
        self._connection: socket.socket | None = connection
        self._program = program
        self._wake = wake
        self._asked = asked
        self._detached = detached
        self._client = messages.peer(connection)[0]
        self._runs = True
        self._ended = False  # and its process id may be somebody else's soon
        # Of the times that the program was stopped: how many the client was told of, after which it says that it goes
        # on, and after which it was continued from here.
        self._told = self._resumed = self._woken = 0

    def run(self) -> NoReturn:
        """Until the program and all that it started have ended."""
        self._tell({"started": self._program})
        while True:
            answer = self._children()
            if answer is not None:
                break
            if self._asked or (self._connection is None and not self._detached):
                answer = self._end()
                break
            waited: list[Any] = [self._wake, *([self._connection] if self._connection else [])]
            ready, _, _ = select.select(waited, [], [], _AGAIN if self._client_is_behind() else None)
            if self._wake in ready:
                processes.awake(self._wake)
            if self._connection in ready:
                self._hear()
            if self._client_is_behind():
                self._wake_client()
        processes.end_all_below(os.getpid(), GRACE)
        self._tell(answer)
        self._let_client_end()
        os._exit(0)

    def _children(self) -> dict[str, int] | None:
        """Take leave of those that have ended; how the program did, if it has."""
        answer = None
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return answer
            if not process:
                return answer
            if process != self._program:
                continue
            self._ended = os.WIFSIGNALED(status) or os.WIFEXITED(status)
            if os.WIFSTOPPED(status):
                self._runs = False
                self._told += 1
                self._tell({"stopped": self._told})
            elif os.WIFCONTINUED(status):
                self._runs = True
            elif os.WIFSIGNALED(status):
                answer = {"signalled": os.WTERMSIG(status)}
            elif os.WIFEXITED(status):
                answer = {"exited": os.WEXITSTATUS(status)}

    def _hear(self) -> None:
        assert self._connection is not None
        try:
            received = messages.receive(self._connection)
        except (OSError, ThawError):
            received = None
        if received is None:
            self._connection.close()
            self._connection = None
            return
        message, files = received
        messages.close(files)
        number, group = message.get("signal"), message.get("group")
        resumed = message.get("resumed")
        if isinstance(resumed, int):
            self._resumed = resumed
            if resumed != self._woken:  # else the program went on before, and may have been stopped again meanwhile
                number, group = signal.SIGCONT, True
        if isinstance(number, int) and 0 < number < signal.NSIG and not self._ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._program, number) if group else os.kill(self._program, number)

    def _end(self) -> dict[str, int]:
        """Nobody wants the program any more: as if it was asked with SIGTERM, and killed when it does not listen."""
        processes.send_all([self._program], signal.SIGTERM)
        processes.send_all([self._program], signal.SIGCONT)
        deadline = time.monotonic() + GRACE
        while (answer := self._children()) is None:
            if time.monotonic() >= deadline:
                processes.send_all([self._program], signal.SIGKILL)
            time.sleep(0.02)
        return answer

    def _client_is_behind(self) -> bool:
        """Whether somebody has continued the program itself, and its client is stopped with it, or about to be."""
        known = self._connection is not None and self._client  # 0: in another namespace of processes
        return bool(self._runs and known and self._resumed != self._told)

    def _wake_client(self) -> None:
        if processes.is_stopped(self._client):
            self._woken = self._told
            processes.send_all([self._client], signal.SIGCONT)

    def _let_client_end(self) -> None:
        """One that was told to stop may do so before or after it can hear how the program ended."""
        self._runs = True
        deadline = time.monotonic() + GRACE
        while self._client_is_behind() and time.monotonic() < deadline:
            self._wake_client()
            waited: list[Any] = [self._connection]
            if select.select(waited, [], [], _AGAIN)[0]:
                self._hear()

    def _tell(self, message: dict[str, int]) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has gone; the next look at the connection says so
                messages.send(self._connection, message)
