"""Where weights are lent over TCP: ``tcp://HOST:PORT``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

SCHEME = "tcp://"
PORT = 28429
"""Where ``thaw lend`` listens unless told otherwise."""

_ADDRESS = re.compile(
    r"(?:\[([0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9_.-]+)?)\]|([A-Za-z0-9_.-]{1,253})):([0-9]{1,5})"
)


@dataclass(frozen=True)
class Address:
    """A host, without the brackets of IPv6, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def remote(peer: str) -> bool:
    """Whether a loader's ``peer`` is meant to be on the network."""
    return peer.startswith(SCHEME)


def peer_address(peer: str) -> Address:
    """Of ``tcp://HOST:PORT``.

    Raises:
        UsageError: it is none.
    """
    found = _parsed(peer.removeprefix(SCHEME)) if remote(peer) else None
    if found is None or not found.port:
        raise UsageError(
            f"{peer!r} is no address of a peer; it is {SCHEME}HOST:PORT, of IPv6 {SCHEME}[HOST]:PORT, such as "
            f"{SCHEME}127.0.0.1:{PORT}"
        )
    return found


def listening_address(text: str) -> Address:
    """Of ``HOST:PORT``, where 0 is any port that is free.

    Raises:
        UsageError: it is none.
    """
    found = _parsed(text)
    if found is None:
        raise UsageError(
            f"{text!r} is no address to listen at; it is HOST:PORT, of IPv6 [HOST]:PORT, such as 127.0.0.1:{PORT}"
        )
    return found


def _parsed(text: str) -> Address | None:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[3]) > 0xFFFF:
        return None
    return Address(found[1] or found[2], int(found[3]))
