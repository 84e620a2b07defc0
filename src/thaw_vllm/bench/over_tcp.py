"""``thaw bench multi-gpu``: a rank's weights over TCP within this host, beside a plain copy over sockets."""

from __future__ import annotations

import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import ceilings
from .outcome import Missed, Outcome, Say
from .process import PREPARED, READY, STARTING, Child, ChildError, ask
from .record import Record
from .rounds import Entry

WORK, LIMIT = "tcp", "tcp-loopback"
CONNECTIONS = 8
COPY = 1 << 30
"""Bytes of a plain copy, at most."""


def measure(
    devices: Sequence[str],
    request: dict[str, Any],
    limits: ceilings.Settings,
    repeated: Callable[[Entry, str], Outcome],
    say: Say,
) -> Outcome:
    """From a process that has them on the first device, by ``thaw lend``'s part in another, to the last device.

    Args:
        request: ``path``, ``shape`` and ``digests``.
        limits: how a limit is measured.
        repeated: measures takers of this kind, on a route, as often as is asked for.
    """
    outcome, route = _plain(limits, say), f"{devices[0]} → {devices[-1]}, loopback"
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        token = Path(folder) / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        request = request | {"place": f"{folder}/state/offers", "token": str(token), "port": port}
        try:
            with Child("lend", request | {"device": devices[0]}) as lender, Child("lend-tcp", request) as relay:
                for one in (lender, relay):
                    one.reach(READY, STARTING)
                    one.go()
                    one.reach(PREPARED)
                more = {"device": devices[-1], "peer": f"tcp://127.0.0.1:{port}"}
                outcome += repeated(Entry("thaw", devices[-1], "borrow", request | more), route)
        except ChildError as error:
            outcome.missed.append(Missed(WORK, "thaw", route, str(error)))
            say(f"{WORK}: {error}")
    return outcome


def _plain(limits: ceilings.Settings, say: Say) -> Outcome:
    route = f"{CONNECTIONS} connections"
    try:
        found = ask("sockets", {"bytes": min(limits.size, COPY), "runs": limits.runs, "connections": CONNECTIONS})
    except ChildError as error:
        say(f"{LIMIT}, {route}: {error}")
        return Outcome(missed=[Missed(LIMIT, "limit", route, str(error))])
    record = Record(LIMIT, "limit", route, found["bytes"], found["seconds"], "warm", False, None, None, {"ranks": 1})
    say(f"{LIMIT}, {route}: {record.gb_per_s:.2f} GB/s")
    return Outcome([record])
