"""A TCP connection whose two ends have proved that they know one token, and what is sent over it.

All numbers are little-endian. Three messages prove, before anything is said of what is lent::

    taker   "thaw-tcp", version u16, nonce 32 bytes, taker's id 16, content id 64
    lender  "thaw-tcp", version u16, nonce 32
    taker   HMAC-SHA256(token, "taker" + both messages before)
    lender  1, HMAC-SHA256(token, "lender" + both messages before); else 0 and zeros

Then come frames, from the taker READ alone::

    kind u8, offset u64, length u64, payload (none of READ), MAC 32

The MAC is BLAKE3's keyed hash of the frame's number on its way (u64), its first 17 bytes and its payload. Each way has
a key of its own, derived from the token and the first two messages. So nobody without the token can alter, leave out,
repeat or reorder anything, or send back what one side has said. Anybody on the way can read it.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from ..errors import CorruptionError, MismatchError, StorageError

VERSION = 1
READ, DATA, TOLD, REFUSED = 1, 2, 3, 4
PART = 1 << 20
"""Bytes of a READ, at most."""
WRONG = 1.0
"""Seconds that a wrong proof waits for its answer."""
_MAGIC = b"thaw-tcp"
_HELLO = struct.Struct("<8sH32s16s64s")
_ANSWER = struct.Struct("<8sH32s")
_VERDICT = struct.Struct("<B32s")
_FRAME = struct.Struct("<BQQ")
_NUMBER = struct.Struct("<Q")
_MAC = 32
_TEXT = 4 << 10
"""Bytes of what is told, at most."""
_LENDER, _TAKER = b"lender", b"taker"


@dataclass(frozen=True)
class Head:
    """A frame's beginning: not verified, until ``Channel.rest`` has returned."""

    kind: int
    offset: int
    length: int


@dataclass(frozen=True)
class Asked:
    """What a taker has named: itself, by an id that its connections share, and the content id."""

    taker: bytes
    content: str


class Channel:
    """One end of a connection after the proofs; of one thread at a time. Borrows the connection."""

    def __init__(self, connection: socket.socket, keys: tuple[bytes, bytes], patience: float, name: str) -> None:
        """
        Args:
            keys: of what is sent, and of what is received.
            patience: seconds in which a frame is to be sent, or to come, whole.
            name: of the other side, for messages.
        """
        self.connection = connection
        self._sending, self._receiving = keys
        self._sent = self._received = 0
        self._patience, self._name = patience, name
        self._head = b""

    def send(self, kind: int, offset: int, length: int, payload: bytes | memoryview = b"") -> None:
        """Send a frame; its payload may not change meanwhile."""
        head = _FRAME.pack(kind, offset, length)
        mac = _mac(self._sending, self._sent, head, payload)
        self._sent += 1
        until = time.monotonic() + self._patience
        if payload:
            _send(self.connection, head, until)
            _send(self.connection, payload, until)
            _send(self.connection, mac, until)
        else:
            _send(self.connection, head + mac, until)

    def tell(self, kind: int, message: dict[str, Any]) -> None:
        """Send a few plain values."""
        text = json.dumps(message).encode()
        self.send(kind, 0, len(text), text)

    def head(self) -> Head:
        """The next frame's beginning; ``rest`` is to follow.

        Raises:
            OSError: the other side has gone, or takes too long.
        """
        self._head = receive(self.connection, _FRAME.size, time.monotonic() + self._patience)
        return Head(*_FRAME.unpack(self._head))

    def rest(self, view: memoryview) -> None:
        """Fill ``view`` with the frame's payload, as long as that, and verify the frame.

        Raises:
            CorruptionError: it is not the one that was sent; what is in ``view`` must not be used.
            OSError: as ``head``.
        """
        until = time.monotonic() + self._patience
        _receive_into(self.connection, view, until)
        mac = receive(self.connection, _MAC, until)
        if not hmac.compare_digest(mac, _mac(self._receiving, self._received, self._head, view)):
            raise CorruptionError(
                f"what came from {self._name} was altered on the way; find out by whom, or leave 'peer' out"
            )
        self._received += 1

    def told(self, head: Head) -> dict[str, Any]:
        """The values of a frame that ``tell`` has sent.

        Raises:
            MismatchError: it is none.
            CorruptionError, OSError: as ``rest``.
        """
        if head.length > _TEXT:
            raise _strange(self._name)
        text = bytearray(head.length)
        self.rest(memoryview(text))
        try:
            message = json.loads(bytes(text))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise _strange(self._name)
        return message


def introduce(connection: socket.socket, token: bytes, asked: Asked, patience: float, name: str) -> Channel:
    """The taker's side of the proofs.

    Raises:
        MismatchError: the other side has another token, is of another version or is no lender.
        OSError: it has gone, or takes too long.
    """
    hello = _HELLO.pack(_MAGIC, VERSION, secrets.token_bytes(32), asked.taker, asked.content.encode())
    until = time.monotonic() + patience
    _send(connection, hello, until)
    answer = receive(connection, _ANSWER.size, until)
    magic, version, _ = _ANSWER.unpack(answer)
    if magic != _MAGIC:
        raise MismatchError(f"who listens at {name} is no 'thaw lend'; give the address that it prints")
    if version != VERSION:
        raise _strange(name)
    said = hello + answer
    _send(connection, _proof(token, _TAKER, said), until)
    right, proof = _VERDICT.unpack(receive(connection, _VERDICT.size, until))
    if right != 1 or not hmac.compare_digest(proof, _proof(token, _LENDER, said)):
        raise MismatchError(
            f"{name} has another token than this side; give both the same, by 'thaw lend --token-file' there and "
            "THAW_PEER_TOKEN_FILE here"
        )
    return Channel(connection, (_key(token, _TAKER, said), _key(token, _LENDER, said)), patience, name)


def admit(
    connection: socket.socket,
    token: bytes,
    quick: float,
    patience: float,
    name: str,
    pause: Callable[[float], object] = time.sleep,
) -> tuple[Channel, Asked] | None:
    """The lender's side of the proofs; None for who has not given one, and is to be hung up on.

    Args:
        quick: seconds in which all of it has to be there.
        patience: of the channel.
        pause: waits so many seconds, after a wrong proof.

    Raises:
        OSError: the other side has gone, or takes too long.
    """
    until = time.monotonic() + quick
    if receive(connection, len(_MAGIC), until) != _MAGIC:
        return None
    hello = _MAGIC + receive(connection, _HELLO.size - len(_MAGIC), until)
    _, version, _, taker, content = _HELLO.unpack(hello)
    answer = _ANSWER.pack(_MAGIC, VERSION, secrets.token_bytes(32))
    _send(connection, answer, until)
    if version != VERSION:
        return None
    said = hello + answer
    proof = receive(connection, _MAC, until)
    if not hmac.compare_digest(proof, _proof(token, _TAKER, said)):
        pause(WRONG)
        _send(connection, _VERDICT.pack(0, bytes(_MAC)), time.monotonic() + quick)
        return None
    _send(connection, _VERDICT.pack(1, _proof(token, _LENDER, said)), until)
    keys = _key(token, _LENDER, said), _key(token, _TAKER, said)
    return Channel(connection, keys, patience, name), Asked(taker, content.decode("ascii", "replace"))


def receive(connection: socket.socket, count: int, until: float) -> bytes:
    """So many bytes, all by ``until`` (monotonic)."""
    found = bytearray(count)
    _receive_into(connection, memoryview(found), until)
    return bytes(found)


def ended(name: str, error: OSError) -> StorageError:
    """What to raise where the connection to a lender failed."""
    return StorageError(
        f"{name} has gone, or stands still ({error.strerror or error}); see that 'thaw lend' runs there, or leave "
        "'peer' out"
    )


def _receive_into(connection: socket.socket, view: memoryview, until: float) -> None:
    while view:
        connection.settimeout(_left(until))
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        view = view[count:]


def _send(connection: socket.socket, data: bytes | memoryview, until: float) -> None:
    done, room = 0, select.poll()
    room.register(connection, select.POLLOUT | select.POLLRDHUP)
    while done < len(data):
        for _, found in room.poll(1000 * _left(until)):
            if not found & select.POLLOUT:  # it has hung up: TCP need not tell of room any more
                raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        connection.settimeout(_left(until))
        with memoryview(data)[done:] as rest:  # an error must not keep hold of what its handlers unmap
            done += connection.send(rest)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _proof(token: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(token, role + said, hashlib.sha256)


def _key(token: bytes, sender: bytes, said: bytes) -> bytes:
    """``said`` has one length, so that this cannot be the token and the messages of others."""
    return blake3(token + said, derive_key_context=f"thaw weights over TCP 1, frames of the {sender.decode()}").digest()


def _mac(key: bytes, number: int, head: bytes, payload: bytes | memoryview) -> bytes:
    found = blake3(_NUMBER.pack(number) + head, key=key)
    found.update(payload)
    return found.digest()


def _strange(name: str) -> MismatchError:
    return MismatchError(f"{name} speaks another version of thaw's protocol; install the same thaw at both ends")
