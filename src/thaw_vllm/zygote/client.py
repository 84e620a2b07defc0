"""The side of the user's terminal: hands a program over, passes signals on, and ends as the program ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
from typing import Any, NoReturn

from ..errors import StorageError, ThawError, UsageError, named
from . import messages
from .place import Place, check
from .program import described

_PATIENCE = 30.0
"""Seconds for a zygote to answer."""
_FROM_THE_KERNEL = 0x80
"""``SI_KERNEL``: a key of the terminal sent the signal, and to every process in the foreground."""
_OF_THE_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP, signal.SIGWINCH}
_PASSED_ON = {
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
}


class NoZygoteError(UsageError):
    """None runs under that name."""


def connect(place: Place) -> socket.socket:
    """A connection to the zygote of a place.

    Raises:
        NoZygoteError: there is none.
        StorageError: the directory, or who listens, is not this user's alone.
    """
    cure = f"thaw zygote start{'' if place.name == 'default' else f' --name {place.name}'}"
    missing = NoZygoteError(f"no zygote {place.name!r} runs; {cure}")
    if not check(place.directory):
        raise missing
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(place.socket))
        if messages.peer(connection)[1] != os.getuid():
            raise StorageError(f"another user listens on {str(place.socket)!r}; remove it")
    except BaseException as error:
        connection.close()
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            raise missing from None
        if isinstance(error, OSError):
            raise StorageError(f"cannot connect to {str(place.socket)!r}: {error.strerror}") from None
        raise
    return connection


def ask(place: Place, what: str) -> dict[str, Any]:
    """A zygote's answer to ``status`` or ``stop``.

    Raises:
        NoZygoteError, StorageError: as ``connect``.
        ThawError: it refused, or ended meanwhile.
    """
    with connect(place) as connection:
        try:
            connection.settimeout(_PATIENCE)
            messages.send(connection, {"do": what})
            return _answer(connection)
        except OSError as error:
            raise _lost(place, error) from None


def _lost(place: Place, error: OSError) -> ThawError:
    if isinstance(error, TimeoutError):
        return ThawError(f"the zygote {place.name!r} has not answered for {_PATIENCE:.0f} s; its log is {place.log}")
    return ThawError(f"the zygote {place.name!r} ended while it was asked: {error.strerror}")


def _answer(connection: socket.socket) -> dict[str, Any]:
    received = messages.receive(connection)
    if received is None:
        raise ThawError("the zygote, or the keeper of the program, has ended without an answer; its log says why")
    message = received[0]
    if "refused" in message:
        raise (named(message.get("error")) or ThawError)(message["refused"])
    return message


class Handed:
    """A program that a zygote has been given.

    Attributes:
        pid: the program's process id.
    """

    def __init__(self, place: Place, arguments: list[str], kind: str, *, detached: bool = False) -> None:
        """Hand it over: this process's environment, working directory, streams, limits and ignored signals with it.

        Raises:
            NoZygoteError, StorageError: as ``connect``.
            ThawError: the zygote refused, of the class that it names.
        """
        self._connection = connect(place)
        try:
            try:
                request, files = described(arguments, kind, detached=detached)
            except OSError as error:
                raise StorageError(f"cannot tell what the program shall be given: {error}") from None
            try:
                self._connection.settimeout(_PATIENCE)
                messages.send(self._connection, request, files)
            finally:
                os.close(files[-1])
            self.pid = int(_answer(self._connection)["started"])
            self._connection.settimeout(None)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, OSError):
                raise _lost(place, error) from None
            raise
        self._answer: dict[str, Any] | None = None
        self._stopped = 0

    def leave(self) -> None:
        """Let a detached program run on by itself."""
        self._connection.close()

    def stand_for(self) -> NoReturn:
        """Be the program for whoever started this process, until it has ended; then end in the same way."""
        waited = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
        waited.add(signal.SIGCHLD)  # nobody's; the listening thread says with it that a message has come
        signal.pthread_sigmask(signal.SIG_BLOCK, waited)
        listening = threading.Thread(target=self._listen, args=(threading.get_ident(),), daemon=True)
        listening.start()
        while self._answer is None:
            info = signal.sigwaitinfo(waited)
            number = signal.Signals(info.si_signo)
            if number == signal.SIGCHLD:
                self._stop_too()
            else:
                keyed = number in _OF_THE_TERMINAL and info.si_code == _FROM_THE_KERNEL
                self._pass_on(number, group=keyed or number == signal.SIGCONT)
        _end(self._answer)

    def _listen(self, waiting: int) -> None:
        while True:
            try:
                received = messages.receive(self._connection)
            except (OSError, ThawError):
                received = None
            message = {"lost": 1} if received is None else received[0]
            if "stopped" in message:
                self._stopped = message["stopped"]
            else:
                self._answer = message
            signal.pthread_kill(waiting, signal.SIGCHLD)
            if self._answer is not None:
                return

    def _pass_on(self, number: int, *, group: bool) -> None:
        self._send({"signal": int(number), "group": group})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the keeper has gone, and the listening thread will say so
            messages.send(self._connection, message)

    def _stop_too(self) -> None:
        """The program was stopped, so that the shell must see this process stopped; both go on together."""
        number = self._stopped
        if number:
            self._stopped = 0
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.sigtimedwait([signal.SIGCONT], 0)  # what continued this process is passed on once
            self._send({"resumed": number})


def _end(answer: dict[str, Any]) -> NoReturn:
    if "signalled" in answer:
        number = int(answer["signalled"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    if "lost" in answer:
        os.write(2, b"error: the program's keeper was killed, and the program with it\n")
        os._exit(1)
    os._exit(int(answer["exited"]))
