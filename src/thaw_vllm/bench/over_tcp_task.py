"""The child's side of weights over TCP: who lends them, and a plain copy over sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..transport.peer_token import lender_token
from ..transport.tcp_address import Address
from ..transport.tcp_lender import Lender
from .child import Steps

_STEP = 1 << 20


def lend(request: dict[str, Any]) -> Steps:
    """What is offered in ``place``, lent at ``port`` of this host with the token of the file ``token``."""
    yield
    token, _ = lender_token(Path(request["token"]), os.environ)
    with contextlib.closing(Lender(Address("127.0.0.1", request["port"]), token, Path(request["place"]))) as lender:
        threading.Thread(target=lender.serve, daemon=True).start()
        yield
        yield
    return {}


def sockets(request: dict[str, Any]) -> Steps:
    """``bytes`` from another process over so many ``connections`` of this host, ``runs`` times, into memory."""
    yield
    count, runs = request["connections"], request["runs"]
    share = -(-request["bytes"] // count)
    room = bytearray(b"\xff") * (share * count)
    listening = socket.create_server(("127.0.0.1", 0), backlog=count)
    child = os.fork()
    if not child:
        try:
            for _ in range(runs):
                _each(count, lambda number: _send(listening, share))
        finally:
            os._exit(0)
    yield
    seconds = []
    with memoryview(room) as view:
        for _ in range(runs):
            start = time.perf_counter()
            _each(count, lambda number: _receive(listening, view[number * share : (number + 1) * share]))
            seconds.append(time.perf_counter() - start)
    os.waitpid(child, 0)
    listening.close()
    yield
    if room.count(0) != len(room):
        raise ValueError("not all of it has arrived")
    return {"seconds": seconds, "bytes": share * count}


def _each(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send(listening: socket.socket, size: int) -> None:
    data = memoryview(bytes(_STEP))
    connection, _ = listening.accept()
    with connection:
        for at in range(0, size, _STEP):
            connection.sendall(data[: size - at])


def _receive(listening: socket.socket, view: memoryview) -> None:
    with socket.create_connection(listening.getsockname()) as connection:
        while view and (count := connection.recv_into(view)):
            view = view[count:]


TASKS = {"lend-tcp": lend, "sockets": sockets}
