"""What clients, zygotes and keepers tell one another: JSON with its length in front, files beside it."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ThawError

_LENGTH = struct.Struct("<I")
_LIMIT = 64 << 20
"""Bytes of a message; an environment has a few MiB at most."""
_FILES = 8
_CREDENTIALS = struct.Struct("3i")


def send(connection: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Send one message, and descriptors with it, which stay the caller's to close."""
    body = json.dumps(message).encode()
    header = _LENGTH.pack(len(body))
    if files:
        sent = socket.send_fds(connection, [header], files)
        header = header[sent:]
    connection.sendall(header + body)


def receive(connection: socket.socket, limit: int = _LIMIT) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and the descriptors that came with it, which are the caller's to close; None at the end.

    A connection's time limit is one for the whole message.

    Args:
        limit: bytes that it may have.

    Raises:
        ThawError: it is no message of this protocol; descriptors are closed.
        TimeoutError: it was not there in time, whole.
    """
    patience = connection.gettimeout()
    until = time.monotonic() + patience if patience else None
    header, files, _, _ = socket.recv_fds(connection, _LENGTH.size, _FILES, socket.MSG_CMSG_CLOEXEC)
    if not header:
        return None
    try:
        header += _exactly(connection, _LENGTH.size - len(header), until)
        (length,) = _LENGTH.unpack(header)
        if length > limit:
            raise ThawError(f"a message of {length} bytes; is the other side of another version?")
        message = json.loads(_exactly(connection, length, until))
        if not isinstance(message, dict):
            raise ThawError("a message that is no object; is the other side of another version?")
    except BaseException as error:
        close(files)
        if isinstance(error, (ValueError, RecursionError)):
            raise ThawError("a message that is no JSON; is the other side of another version?") from None
        raise
    finally:
        if until is not None:
            connection.settimeout(patience)
    return message, list(files)


def close(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)


def _exactly(connection: socket.socket, count: int, until: float | None) -> bytes:
    found = bytearray()
    while len(found) < count:
        if until is not None:
            connection.settimeout(max(0.001, until - time.monotonic()))
            if time.monotonic() >= until:
                raise TimeoutError("timed out in the middle of a message")
        more = connection.recv(min(count - len(found), 1 << 20))
        if not more:
            raise ConnectionResetError("the other side has gone in the middle of a message")
        found += more
    return bytes(found)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other side, as the kernel has them."""
    size = _CREDENTIALS.size
    process, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return process, user
