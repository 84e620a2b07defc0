"""Bytes that ``thaw lend`` lends over TCP, as a source."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import CorruptionError, MismatchError, StorageError, ThawError, named
from .tcp_address import Address
from .tcp_channel import DATA, PART, READ, REFUSED, TOLD, Asked, Channel, Head, ended, introduce

PATIENCE = 60.0
"""Seconds in which a part is to arrive; within them a lender on the host copies its bytes first."""
CONNECT = 5.0
_MOST = 8
"""Connections at a time."""
_AHEAD = 16
"""Parts that are asked for before the first of them is there."""


class TcpSource:
    """A lender's bytes, verified by the channel's MAC; owns its connections until closed.

    Attributes:
        name: what messages call it.
        size: bytes in all, counted from offset 0.
    """

    def __init__(self, address: Address, token: bytes, content: str, begin: int, count: int) -> None:
        """
        Args:
            address: of ``thaw lend``.
            token: see ``peer_token``.
            content: the content id.
            begin: the offset of the first byte that is lent.
            count: bytes that are lent.

        Raises:
            StorageError: nobody listens there; nobody there offers these weights.
            MismatchError: see ``tcp_channel.introduce``; other weights are lent.
            ThawError: the lender refuses; its error.
        """
        self.name, self.size = f"the weights at {address}", begin + count
        self._address, self._token, self._begin, self._count = address, token, begin, count
        self._asked = Asked(secrets.token_bytes(16), content)
        self._lock, self._room = threading.Lock(), threading.Semaphore(_MOST)
        self._idle, self._connections = list[Channel](), set[socket.socket]()
        self._failed: BaseException | None = None
        try:
            with self._channel():
                pass  # whoever cannot be reached, or refuses, is found out before anything is read
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source; also raises StorageError when the lender has gone."""
        at = offset - self._begin
        if at < 0 or at + len(view) > self._count:
            raise CorruptionError(f"{self.name} have no {len(view)} bytes at {offset}")
        if len(view):
            with self._channel() as channel:
                self._fetch(channel, at, view)

    def abandon(self) -> None:
        """Hang up on the lender: threads that read fail at once. In any thread."""
        self._first(ConnectionAbortedError(errno.ECONNABORTED, "it was interrupted"))

    def check_unchanged(self) -> None:
        """See Source; sums tell."""

    def close(self) -> None:
        """Hang up; nothing may be reading. A second call does nothing."""
        with self._lock:
            connections, self._connections = self._connections, set()
            self._idle.clear()
        for connection in connections:
            connection.close()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Channel]:
        """A connection for this thread; an error in one thread ends the others' at once."""
        with self._room:
            try:
                with self._lock:
                    channel = self._idle.pop() if self._idle else None
                    failed = self._failed is not None
                if failed:
                    raise StorageError(f"the connection to {self._address} was closed")
                if channel is None:
                    channel = self._connected()
                yield channel
            except BaseException as error:
                raise self._first(error) from None
            with self._lock:
                self._idle.append(channel)

    def _first(self, error: BaseException) -> BaseException:
        """Hang up; the error that came first, which others follow from."""
        if isinstance(error, OSError):
            error = ended(f"the peer {self._address}", error)
        with self._lock:
            first, self._failed = self._failed, self._failed or error
            if first is None:
                for connection in self._connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
        return type(first)(str(first)) if isinstance(first, ThawError) else error

    def _connected(self) -> Channel:
        where = str(self._address)
        try:
            connection = socket.create_connection((self._address.host, self._address.port), CONNECT)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(
                f"nobody lends weights at {where}: {reason}; start 'thaw lend' there, with --listen for other hosts"
            ) from None
        with self._lock:
            if self._failed is not None:  # nobody hangs up on it any more
                connection.close()
                raise StorageError(f"the connection to {self._address} was closed")
            self._connections.add(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = introduce(connection, self._token, self._asked, PATIENCE, f"the peer {where}")
        told = self._checked(channel, channel.head(), TOLD)
        if told.get("bytes") != self._count:
            raise MismatchError(f"{self.name} are not as large as the snapshot says")
        return channel

    def _fetch(self, channel: Channel, at: int, view: memoryview) -> None:
        parts = [(begin, min(PART, len(view) - begin)) for begin in range(0, len(view), PART)]
        for number, (begin, size) in enumerate(parts):
            for ahead, length in parts[:_AHEAD] if number == 0 else parts[number + _AHEAD - 1 : number + _AHEAD]:
                channel.send(READ, at + ahead, length)
            head = channel.head()
            if head != Head(DATA, at + begin, size):
                self._checked(channel, head, DATA)
            channel.rest(view[begin : begin + size])

    def _checked(self, channel: Channel, head: Head, kind: int) -> dict[str, Any]:
        """What is told; raises what the lender refuses with, and where this is no frame of that kind."""
        if head.kind == REFUSED:
            message = channel.told(head)
            raise (named(message.get("error")) or ThawError)(f"{self._address}: {message.get('message')}")
        if head.kind != kind or kind != TOLD:
            raise CorruptionError(f"{self._address} sent something else than it was asked for")
        return channel.told(head)
