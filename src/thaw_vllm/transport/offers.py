"""Who lends what: processes that offer bytes by their content id, and how another process asks one for them.

An offer is a Unix socket in a directory that is its owner's alone. Its name tells a digest of the content id, and the
process. Who connects has to be the same user (as the kernel says) and to name the content id; it is told where the
bytes lie, and they are lent as long as it keeps the connection. So a borrower that dies gives them back. Each boot of a
machine has a directory of its own: where machines share a home, nobody listens at another one's sockets.

Messages are those of ``zygote.messages``: JSON, and descriptors beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BusyError, MismatchError, StorageError, ThawError, named
from ..zygote import messages
from .private import STATE, private, state_path

PATIENCE = 60.0
"""Seconds in which borrowers are to be done, and a lender to answer that copies its bytes first."""
QUICK = 5.0
"""Seconds in which who has connected is to say what it wants, and a lender to answer that copies nothing."""
_MOST = 64
"""Connections at a time."""
_QUESTION = 4 << 10
"""Bytes of what is asked."""
_OWN: set[str] = set()
"""Names of the sockets of this process's offers; process ids are not its alone, where containers share a directory."""
_CURE = f"set {STATE} to a directory of your own"

Lend = Callable[[], tuple[dict[str, Any], list[int]]]
"""What borrowers are told, and descriptors that are then closed; raises ThawError to refuse."""


def directory(environment: Mapping[str, str]) -> Path:
    """Where this machine's offers are, in the directory of what is private to this user."""
    return state_path(environment) / "offers" / Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Offer:
    """Bytes that this process lends to whoever asks for their content id; a thread, until withdrawn or ended.

    It is the process's that has made it: in forks nothing comes of withdrawing it.

    Attributes:
        path: the socket.
    """

    def __init__(self, place: Path, content: str, lend: Lend) -> None:
        """
        Args:
            place: the directory, which is made.
            content: the content id.
            lend: called in the thread, again for each borrower.

        Raises:
            StorageError: the directory is not private, or no socket can be made there.
        """
        for part in (place.parent.parent, place.parent, place):
            private(part, _CURE)
        with contextlib.suppress(OSError):
            os.chmod(place, 0o700)
        self._content, self._lend = content, lend
        self._process, self._borrowers, self._withdrawn = os.getpid(), 0, False
        self._lock = threading.RLock()  # a collection of garbage may call ``end`` in whichever thread has it
        name = f"{self._process}.{secrets.token_hex(4)}.sock"
        self.path, self._aside = place / f"{_digest(content)}.{name}", place / f"withdrawn.{name}"
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._wake, self._woken = socket.socketpair()
        hidden = self.path.with_name("." + self.path.name)
        try:
            with _address(hidden) as address:
                self._listening.bind(address)
            self._listening.listen()
            os.rename(hidden, self.path)  # only now: one that does not listen counts as left behind
            _OWN.add(self.path.name)
            self._thread = threading.Thread(target=self._serve, name="thaw-offer", daemon=True)
            self._thread.start()
        except BaseException as error:
            self._close()
            hidden.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError(f"no socket can be made in {str(place)!r}: {error.strerror}; {_CURE}") from None
            raise

    @property
    def borrowers(self) -> int:
        """How many there are at the moment."""
        return self._borrowers

    def withdraw(self, patience: float = PATIENCE) -> None:
        """Lend to nobody any more, and wait until all have what they have begun to copy; a second call does nothing.

        Args:
            patience: seconds.

        Raises:
            BusyError: somebody still copies; the bytes are to stay what and where they are, and are offered again.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            if not self._withdrawn:
                self._withdraw()
        self._thread.join(patience)
        with self._lock:
            if self._borrowers:
                self._withdrawn = False
                _renamed(self._aside, self.path)
                raise BusyError(f"{self._borrowers} other processes are still copying this one's weights; try again")
        self._aside.unlink(missing_ok=True)

    def end(self, patience: float) -> None:
        """``withdraw`` for good: the bytes go, whoever copies them. Called by the offer's own thread it does not wait.

        Args:
            patience: seconds in which borrowers are to be done.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            self._withdraw()
        self._aside.unlink(missing_ok=True)
        if self._thread is not threading.current_thread():
            self._thread.join(patience)

    def _withdraw(self) -> None:
        self._withdrawn = True
        _renamed(self.path, self._aside)
        with contextlib.suppress(OSError):
            self._wake.send(b".")

    def _serve(self) -> None:
        asking = dict[Any, float]()  # who has connected, and until when each is to say what it wants
        with selectors.DefaultSelector() as selector:
            for one in (self._listening, self._woken):
                selector.register(one, selectors.EVENT_READ)
            while not self._over():
                soonest = min(asking.values(), default=None)
                wait = None if soonest is None else max(0.0, soonest - time.monotonic())
                ready: set[Any] = {key.fileobj for key, _ in selector.select(wait)}
                late = {one for one, until in asking.items() if until <= time.monotonic()}
                for found in ready | late:
                    if found is self._woken:
                        found.recv(64)
                    elif found is self._listening:
                        self._admit(selector, asking)
                    elif found in asking and found in ready and self._answered(found):
                        del asking[found]
                    else:  # it has ended, is refused, or says nothing
                        selector.unregister(found)
                        found.close()
                        if asking.pop(found, None) is None:
                            self._count(-1)
            for one in asking:
                one.close()
        self._close()

    def _over(self) -> bool:
        with self._lock:
            return self._withdrawn and not self._borrowers

    def _admit(self, selector: selectors.BaseSelector, asking: dict[Any, float]) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            time.sleep(0.1)  # no descriptor or memory for it now; it waits
            return
        if len(asking) + self._borrowers >= _MOST:
            connection.close()
            return
        connection.settimeout(QUICK)
        asking[connection] = time.monotonic() + QUICK
        selector.register(connection, selectors.EVENT_READ)

    def _answered(self, connection: socket.socket) -> bool:
        """Whether the other side is a borrower from now on."""
        counted = borrows = False
        files: list[int] = []
        if self._withdrawn:  # nobody is waited for any more, also who dribbles
            return False
        try:
            asked = messages.receive(connection, _QUESTION)
            if asked is None:
                return False
            messages.close(asked[1])
            self._check(connection, asked[0])
            counted = self._count(1)  # before the bytes are looked at: they may not go meanwhile either
            if counted:
                told, files = self._lend()
                messages.send(connection, {"process": os.getpid(), "lent": told}, files)
                borrows = True
        except ThawError as error:
            with contextlib.suppress(OSError):
                messages.send(connection, {"error": type(error).__name__, "message": str(error)})
        except OSError:
            pass  # it has gone
        except Exception as error:
            logging.getLogger(__name__).warning("an offer of weights could not be answered: %s", error)
        finally:
            messages.close(files)
            if counted and not borrows:
                self._count(-1)
        return borrows

    def _check(self, connection: socket.socket, asked: dict[str, Any]) -> None:
        if messages.peer(connection)[1] != os.geteuid():
            raise MismatchError("only the user whose weights these are may copy them")
        content = asked.get("content")
        if not isinstance(content, str) or not hmac.compare_digest(content.encode(), self._content.encode()):
            raise MismatchError("other weights are offered here than those that are asked for")

    def _count(self, change: int) -> bool:
        """Whether there may be one more, or fewer."""
        with self._lock:
            if change > 0 and self._withdrawn:
                return False
            self._borrowers += change
        return True

    def _close(self) -> None:
        for one in (self._listening, self._wake, self._woken):
            one.close()


@dataclass(frozen=True)
class Answer:
    """What a lender has told.

    Attributes:
        process: its id.
        told, files: for ``lending.borrow``; the files are closed with the connection.
    """

    process: int
    told: dict[str, Any]
    files: list[int]


def offered(place: Path, content: str) -> list[Path]:
    """Sockets at which bytes of this content id are offered; all that nobody listens at are removed."""
    try:
        private(place, _CURE, write=False)
    except StorageError:
        return []
    found, digest = [], _digest(content)
    for path in sorted(place.glob("[!.]*.sock")):  # a hidden one does not listen yet
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(QUICK)
            try:
                with _address(path) as address:
                    probe.connect(address)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                continue
            if path.name.startswith(f"{digest}."):
                found.append(path)
    return found


def own(path: Path) -> bool:
    """Whether an offer is this process's."""
    return path.name in _OWN


@contextlib.contextmanager
def asked(path: Path, content: str, patience: float = PATIENCE) -> Iterator[Answer]:
    """Ask for bytes; they are lent as long as the ``with`` lasts.

    Args:
        patience: seconds in which the lender is to answer.

    Raises:
        StorageError: nobody answers there.
        MismatchError: another user does, or other bytes are offered.
        ThawError: the lender refuses; its error.
    """
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            connection.settimeout(patience)
            found = os.lstat(path)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise MismatchError(f"{str(path)!r} is not a socket of this user's; weights are taken from no other")
            with _address(path) as address:
                connection.connect(address)
            if messages.peer(connection)[1] != os.geteuid():
                raise MismatchError(f"another user listens at {str(path)!r}; weights are taken from no other")
            messages.send(connection, {"content": content})
            answer = messages.receive(connection)
        except OSError as error:
            raise StorageError(f"nobody offers weights at {str(path)!r}: {error.strerror or error}") from None
        if answer is None:
            raise StorageError(f"who offered weights at {str(path)!r} has ended, or offers them no more")
        message, files = answer
        stack.callback(messages.close, files)
        if "error" in message:
            raise (named(message["error"]) or ThawError)(str(message.get("message")))
        process, told = message.get("process"), message.get("lent")
        if type(process) is not int or not isinstance(told, dict):
            raise MismatchError(f"who listens at {str(path)!r} is of another version of thaw; start it again")
        yield Answer(process, told, files)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _renamed(path: Path, to: Path) -> None:
    with contextlib.suppress(OSError):  # somebody has removed it
        os.rename(path, to)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A socket's path, through a descriptor of its directory: paths of sockets are 107 bytes at most."""
    place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{place}/{path.name}"
    finally:
        os.close(place)
