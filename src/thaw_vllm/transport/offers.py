"""Who lends what: processes that offer bytes by their content id, and how another process asks one for them.

An offer is a Unix socket in a directory that is its owner's alone. Its name tells a digest of the content id, and the
process. Who connects has to be the same user (as the kernel says) and to name the content id; it is told where the
bytes lie, and they are lent as long as it keeps the connection. So a borrower that dies gives them back.

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

from ..errors import MismatchError, StorageError, ThawError, UnsupportedError, named
from ..zygote import messages
from .private import STATE, private, state_path

PATIENCE = 60.0
"""Seconds in which borrowers are to be done, and a lender to answer."""
_QUICK = 5.0
"""Seconds in which who has connected is to say what it wants."""
_CURE = f"set {STATE} to a directory of your own"

Lend = Callable[[], tuple[dict[str, Any], list[int]]]
"""What borrowers are told, and descriptors that are then closed; raises ThawError to refuse."""


def directory(environment: Mapping[str, str]) -> Path:
    """Where offers are, in the directory of what is private to this user."""
    return state_path(environment) / "offers"


class Offer:
    """Bytes that this process lends to whoever asks for their content id; a thread, until withdrawn.

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
        for part in (place.parent, place):
            private(part, _CURE)
        with contextlib.suppress(OSError):
            os.chmod(place, 0o700)
        self._content, self._lend = content, lend
        self._changed, self._borrowers, self._withdrawn = threading.Condition(), 0, False
        self.path = place / f"{_digest(content)}.{os.getpid()}.{secrets.token_hex(4)}.sock"
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._wake, self._woken = socket.socketpair()
        hidden = self.path.with_name("." + self.path.name)
        try:
            with _address(hidden) as address:
                self._listening.bind(address)
            self._listening.listen()
            os.rename(hidden, self.path)  # only now: one that does not listen counts as left behind
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
            UnsupportedError: somebody still copies; the bytes are to stay what and where they are.
        """
        with self._changed:
            self._withdrawn = True
            self.path.unlink(missing_ok=True)
            until = time.monotonic() + patience
            while self._borrowers:
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    raise UnsupportedError(
                        f"{self._borrowers} other processes are still copying this one's weights; try again"
                    )
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listening, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            asking: set[Any] = set()
            while True:
                for key, _ in selector.select():
                    found: Any = key.fileobj
                    if found is self._woken:
                        for one in asking:
                            one.close()
                        self._close()
                        return
                    if found is self._listening:
                        with contextlib.suppress(OSError):
                            connection, _ = self._listening.accept()
                            connection.settimeout(_QUICK)
                            asking.add(connection)
                            selector.register(connection, selectors.EVENT_READ)
                    elif found not in asking or not self._answered(found):
                        # It has ended, or is refused.
                        selector.unregister(found)
                        found.close()
                        if found not in asking:
                            self._count(-1)
                        asking.discard(found)
                    else:
                        asking.discard(found)

    def _answered(self, connection: socket.socket) -> bool:
        """Whether the other side is a borrower from now on."""
        counted = borrows = False
        files: list[int] = []
        try:
            asked = messages.receive(connection)
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
        with self._changed:
            if change > 0 and self._withdrawn:
                return False
            self._borrowers += change
            self._changed.notify_all()
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
    """Sockets at which bytes of this content id are offered, those that nobody listens at removed."""
    try:
        private(place, _CURE, write=False)
    except StorageError:
        return []
    found = []
    for path in sorted(place.glob(f"{_digest(content)}.*.sock")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_QUICK)
            try:
                with _address(path) as address:
                    probe.connect(address)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                continue
            found.append(path)
    return found


@contextlib.contextmanager
def asked(path: Path, content: str) -> Iterator[Answer]:
    """Ask for bytes; they are lent as long as the ``with`` lasts.

    Raises:
        StorageError: nobody answers there.
        MismatchError: another user does, or other bytes are offered.
        ThawError: the lender refuses; its error.
    """
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            connection.settimeout(PATIENCE)
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


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A socket's path, through a descriptor of its directory: paths of sockets are 107 bytes at most."""
    place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{place}/{path.name}"
    finally:
        os.close(place)
