"""A pool as a program: its directory, its web server, its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ..errors import UsageError
from .app import application
from .config import Settings
from .engine import Runtime, ServerEngine
from .pool import Pool
from .state import new_logs

LAST_PORT = 65535
GRACE = 30
"""Seconds in which requests may end once the server is asked to stop."""


@dataclass(frozen=True)
class Listening:
    """Where, and for whom.

    Attributes:
        host, port: of TCP.
        api_keys: of those who may ask models; none: everybody.
        token: the admin token.
        token_file: where it can be read; None where it was given.
        hosts: further names of this server.
        directories: in which admin requests may name models and snapshots.
        kv_directory: in which engines have their files of KV blocks.
        sessions_directory: of the store in which they keep sessions.
    """

    host: str
    port: int
    token: str
    token_file: Path | None = None
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    kv_directory: str | None = None
    sessions_directory: str | None = None


def run(settings: Settings, where: Listening, options: Sequence[str], gpu: bool) -> None:
    """Serve until a signal says to stop.

    Args:
        options: words for every engine's ``thaw serve``.
        gpu: whether engines are on one.

    Raises:
        UsageError: the address cannot be had.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bound = _bound(where.host, where.port)
    runtime_directory = os.environ.get("XDG_RUNTIME_DIR") or None
    with tempfile.TemporaryDirectory(prefix="thaw-pool-", dir=runtime_directory, ignore_cleanup_errors=True) as made:
        runtime = Runtime(Path(made), new_logs(), tuple(options), gpu)
        pool = Pool(settings, lambda model: ServerEngine(model, runtime))
        app = application(
            *(pool, where.token, where.api_keys, where.hosts, where.directories),
            *(where.kv_directory, where.sessions_directory),
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
            server_header=False,
            ws="none",
        )
        server = _Server(config, pool, where)
        for number in (signal.SIGINT, signal.SIGTERM):  # the web server raises them again once it has ended
            signal.signal(number, lambda number, frame: None)
        with bound:
            server.run([bound])


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port <= LAST_PORT:
        raise UsageError(f"there is no port {port}; choose another --port")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        made = socket.create_server(address[:2], family=family, backlog=2048)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it; asyncio leaves it off
        return made
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{host}:{port} cannot be listened on: {why}; choose another --host or --port") from None


class _Server(uvicorn.Server):  # type: ignore[misc]
    def __init__(self, config: uvicorn.Config, pool: Pool, where: Listening) -> None:
        super().__init__(config)
        self._pool, self._where = pool, where

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Who waits for a model is told before those are waited for that are being answered."""
        self._pool.close()
        running = sum(one.inflight for one in self._pool.residents)
        if running:
            said = f"thaw: stopping; {running} requests may end within {GRACE} s (once more, and they are cut)"
            print(said, file=sys.stderr, flush=True)
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where, once it listens."""
        await super().startup(sockets)
        if self.started:
            names = ", ".join(self._pool.models)
            port = sockets[0].getsockname()[1] if sockets else self._where.port
            url = f"http://{self._where.host}:{port}"
            said = [f"ready at {url}", f"models: {names}", f"a page about them: {url}/thaw"]
            if self._where.token_file is not None:
                said.append(f"the admin token is in {self._where.token_file}")
            print(f"thaw: {'; '.join(said)}", file=sys.stderr, flush=True)
