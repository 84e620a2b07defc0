"""What processes of this host offer, lent over TCP: the server's side of ``tcp_channel``.

Each taker borrows from the process that offers, as a taker of the same host does, and over one connection of its own to
it: as long as that stands the bytes stay what and where they are. It ends with the last of the taker's connections. So
a taker that dies gives the bytes back, and an offer that is withdrawn waits for those who are copying and is found by
nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BusyError, CorruptionError, MismatchError, StorageError, ThawError
from .borrowed_gpu import BorrowedGpu, Room
from .lending import Borrowed, borrow_whole
from .offers import PATIENCE, QUICK, asked, directory, offered
from .tcp_address import Address
from .tcp_channel import DATA, PART, READ, REFUSED, TOLD, Asked, Channel, admit

TAKERS = 8
"""At a time, unless told otherwise."""
SILENCE = 30.0
"""Seconds in which a taker has to ask for something, and to take what it has asked for: fewer than an offer waits."""
_EACH = 16
"""Connections of a taker."""
_STRANGERS = 32
"""Connections that have proved nothing yet."""
_ERROR = 300
"""Characters of a refusal."""
_JOIN = 5.0


class Lender:
    """Listens until closed.

    Attributes:
        address: where.
    """

    def __init__(
        self,
        address: Address,
        token: bytes,
        place: Path | None = None,
        takers: int = TAKERS,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            address: where to listen.
            token: see ``peer_token``.
            place: the directory of offers; None for this user's.
            takers: how many at a time.
            say: called with what happens, in several threads.

        Raises:
            StorageError: nothing can listen there.
        """
        self._token, self._place, self._most, self._say = token, place, takers, say
        self._lock, self._stop, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._over.set()
        self._loans, self._strangers = dict[tuple[bytes, str], _Loan](), 0
        self._connections, self._threads = set[socket.socket](), set[threading.Thread]()
        self._listening = _listening(address)
        self._wake, self._woken = socket.socketpair()
        self.address = Address(*self._listening.getsockname()[:2])

    @property
    def takers(self) -> int:
        """How many there are at the moment."""
        return len(self._loans)

    def serve(self) -> None:
        """Take connections, a thread each, until ``close``."""
        with self._lock:
            if self._stop.is_set():
                return
        try:
            self._over.clear()
            with selectors.DefaultSelector() as selector:
                for one in (self._listening, self._woken):
                    selector.register(one, selectors.EVENT_READ)
                while not self._stop.is_set():
                    if any(key.fileobj is self._listening for key, _ in selector.select()):
                        self._accept()
        finally:
            self._over.set()

    def close(self) -> None:
        """Hang up on everybody, and give back what is borrowed; a second call does nothing."""
        with self._lock:
            self._stop.set()
            threads = list(self._threads)
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        until = time.monotonic() + _JOIN
        for thread in threads:
            if thread.ident is not None:  # one that ``_accept`` has not started yet ends by its connection
                thread.join(max(0.0, until - time.monotonic()))
        self._over.wait()  # what a selector waits for may not be closed under it
        for one in (self._listening, self._wake, self._woken):
            one.close()

    def _accept(self) -> None:
        try:
            connection, there = self._listening.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                self._stop.wait(0.1)  # no descriptor is left
            return
        thread = threading.Thread(
            target=self._attended, args=(connection, str(Address(*there[:2]))), name="thaw-lend", daemon=True
        )
        with self._lock:
            welcome = self._strangers < _STRANGERS and not self._stop.is_set()
            if welcome:
                self._strangers += 1
                self._connections.add(connection)
                self._threads.add(thread)
        if not welcome:
            connection.close()
            return
        try:
            thread.start()
        except BaseException as error:
            self._forget(connection, thread, stranger=True)
            if not isinstance(error, RuntimeError):  # which says that no thread is left
                raise

    def _forget(self, connection: socket.socket, thread: threading.Thread, *, stranger: bool) -> None:
        with self._lock:
            self._strangers -= stranger
            self._connections.discard(connection)
            self._threads.discard(thread)
        connection.close()

    def _attended(self, connection: socket.socket, name: str) -> None:
        stranger = True
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found = admit(connection, self._token, QUICK, SILENCE, name, self._stop.wait)
            with self._lock:
                self._strangers -= 1
                stranger = False
            if found is not None:
                self._lend(*found, name)
        except OSError:
            pass  # it has gone
        except Exception as error:
            logging.getLogger(__name__).warning("%s could not be lent weights: %s", name, error)
        finally:
            self._forget(connection, threading.current_thread(), stranger=stranger)

    def _lend(self, channel: Channel, asks: Asked, name: str) -> None:
        try:
            with self._borrowed(asks, name) as loan:
                assert loan.source is not None
                channel.tell(TOLD, {"bytes": loan.source.size})
                loan.last = time.monotonic()
                _serve(channel, loan)
        except CorruptionError:
            return  # somebody has altered a request: nothing is answered
        except ThawError as error:
            channel.tell(REFUSED, {"error": type(error).__name__, "message": str(error)[:_ERROR]})

    @contextlib.contextmanager
    def _borrowed(self, asks: Asked, name: str) -> Iterator[_Loan]:
        """What a taker borrows, by one connection to the offer for all of its own."""
        key = asks.taker, asks.content
        with self._lock:
            loan = self._loans.get(key)
            if loan is None and len(self._loans) >= self._most:
                raise BusyError(
                    f"{self._most} others are taking weights here; try again, or give 'thaw lend' more --takers"
                )
            if loan is None:
                loan = self._loans[key] = _Loan()
            if loan.users >= _EACH:
                raise BusyError(f"a taker has {_EACH} connections at most")
            loan.users += 1
        try:
            with loan.lock:  # the first borrows, others wait for it
                if loan.source is None:
                    loan.borrow(self._place or directory(os.environ), asks.content)
                    with contextlib.suppress(OSError, ValueError):  # nobody listens any more to what is said
                        self._say(f"lends {asks.content[:16]}… to {name}")
            yield loan
        finally:
            with self._lock:
                loan.users -= 1
                last = not loan.users
                if last:
                    del self._loans[key]
            if last:
                loan.close()


class _Loan:
    """Bytes that are borrowed from an offer for one taker.

    Attributes:
        users: connections that read them.
        last: when one of them last asked for something.
        source: those bytes, from 0 on; None until ``borrow``.
    """

    def __init__(self) -> None:
        self.users, self.last, self.lock = 0, time.monotonic(), threading.Lock()
        self.source: Borrowed | None = None
        self._stack = contextlib.ExitStack()

    def borrow(self, place: Path, content: str) -> None:
        """From whoever offers them.

        Raises:
            StorageError: nobody does.
            ThawError: all who do refuse; the last one's error.
        """
        last: ThawError | None = None
        for path in offered(place, content):
            with contextlib.ExitStack() as stack:
                try:
                    answer = stack.enter_context(asked(path, content, PATIENCE))
                    name = f"the weights of process {answer.process}"
                    source = borrow_whole(answer.told, answer.files, name)
                except ThawError as error:
                    last = error
                    continue
                except OSError as error:
                    last = StorageError(f"the weights of a process cannot be borrowed: {error}")
                    continue
                stack.callback(source.close)
                self.source, self._stack = source, stack.pop_all()
                return
        raise last or StorageError("nobody offers these weights; start an engine there with --offer-weights")

    def close(self) -> None:
        """Give them back."""
        self._stack.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int, int], memoryview]]:
        """For one thread: a range's bytes, until the next one; the caller releases them.

        Raises:
            OSError, DeviceError: there is no memory or stream for it.
        """
        assert self.source is not None
        if isinstance(self.source, BorrowedGpu):
            with contextlib.closing(Room(self.source, PART)) as room:
                yield room.read
        else:
            yield self.source.view


def _serve(channel: Channel, loan: _Loan) -> None:
    """Answer one connection, until it ends or its taker says nothing for too long.

    Raises:
        MismatchError: it has asked for what is not lent.
        OSError: it has gone, or does not take what it has asked for.
    """
    assert loan.source is not None
    with loan.reading() as read:
        while _speaks(channel.connection, loan):
            head = channel.head()
            channel.rest(memoryview(b""))
            if head.kind != READ or not 0 < head.length <= PART or head.offset + head.length > loan.source.size:
                raise MismatchError(f"{head.length} bytes at {head.offset} are not lent")
            with read(head.offset, head.length) as view:
                channel.send(DATA, head.offset, head.length, view)
            loan.last = time.monotonic()


def _speaks(connection: socket.socket, loan: _Loan) -> bool:
    """Wait for a request. Any of the taker's connections may be the one that asks for something."""
    while (left := loan.last + SILENCE - time.monotonic()) > 0:
        connection.settimeout(left)
        with contextlib.suppress(TimeoutError):
            return bool(connection.recv(1, socket.MSG_PEEK))
    return False


def _listening(address: Address) -> socket.socket:
    try:
        found: Any = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(*found[:3])
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setblocking(False)
            listening.bind(found[4])
            listening.listen()
        except BaseException:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"nothing can listen at {address}: {reason}; choose another by --listen HOST:PORT") from None
    return listening
