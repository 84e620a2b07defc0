"""A pool's web application on a real port, before stand-ins for vLLM's servers on real Unix sockets, in one loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from tests.serve.fake_engine import FakeEngine

from thaw_vllm.serve.app import application
from thaw_vllm.serve.config import Model, Settings
from thaw_vllm.serve.pool import Pool

TOKEN = "a token of 24 characters"


class FakeServer(FakeEngine):
    """Stands in for vLLM's server: tells what it was sent, and streams as it is told; its HTTP is real.

    Attributes:
        counted: samples of its metrics, without their labels.
    """

    def __init__(self, model: Model, log: list[tuple[str, str]], socket: Path, **given: object) -> None:
        super().__init__(model, log, **given)
        self.socket, self.session = socket, None
        self.requests: list[dict[str, Any]] = []
        self.counted: dict[str, float] = {}
        self.key = f"key of {socket.name}"
        self.aborted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        self._server = _server(self, uds=str(self.socket))
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        connector = aiohttp.UnixConnector(str(self.socket), limit=0)
        jar = aiohttp.DummyCookieJar()
        self.session = aiohttp.ClientSession(connector=connector, cookie_jar=jar, auto_decompress=False)

    async def stop(self) -> None:
        await super().stop()
        if self._task is not None:
            await self.session.close()  # as the real one does; who still reads an answer would not notice
            self._server.force_exit = self._server.should_exit = True
            await self._task
            self._task = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = {"path": scope["raw_path"], "query": scope["query_string"], "headers": scope["headers"], "body": body}
        self.requests.append(asked)
        if (
            scope["path"].startswith("/v1/")
            and dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode()
        ):
            await _send(send, 401, [], b"not this engine's key")
            return
        if scope["path"] == "/metrics":
            text = '# HELP x:n N\n# TYPE x:n gauge\nx:n{model_name="m"} 3.0\n'
            for name, value in self.counted.items():
                family, kind = name.removesuffix("_total"), "counter" if name.endswith("_total") else "gauge"
                text += f'# HELP {family} N\n# TYPE {family} {kind}\n{name}{{engine="0",model_name="m"}} {value}\n'
            await _send(send, 200, [(b"content-type", b"text/plain")], text.encode())
            return
        told = json.loads(body)
        status, chunks = told.get("status", 200), told.get("chunks", ["whole"])
        headers = [(b"content-type", b"text/event-stream"), (b"x-own", b"1"), (b"x-own", b"2"), (b"set-cookie", b"c=1")]
        await asyncio.sleep(told.get("before", 0))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        watch = asyncio.create_task(self._watch(receive))
        try:
            for chunk in chunks:
                if chunk == "die":
                    raise RuntimeError("the stand-in breaks off, as it was told")
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
                await asyncio.sleep(told.get("pause", 0))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.aborted.set()


async def _send(send: Any, status: int, headers: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _server(app: Any, **where: Any) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", **where))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    return server


class Served:
    """The application, with one stand-in for each model.

    Attributes:
        url: where it listens.
        engines: stand-ins that were made.
    """

    def __init__(
        self, folder: Path, *models: Model, given: dict[str, Any] | None = None, drain: float = 30, **options: Any
    ) -> None:
        self.log: list[tuple[str, str]] = []
        self.engines: list[FakeServer] = []
        self.folder, self.given, self.options = folder, given or {}, options
        self.grace: int | None = None  # seconds in which requests may end when it stops
        self.pool = Pool(Settings({model.name: model for model in models}, drain), self.make)

    def make(self, model: Model) -> FakeServer:
        path = self.folder / f"{len(self.engines)}.sock"
        self.engines.append(FakeServer(model, self.log, path, **self.given))
        return self.engines[-1]

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[aiohttp.ClientSession]:
        """It listens meanwhile, 0: on any port; a client of it."""
        with socket.socket() as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound.bind(("127.0.0.1", port))
            self.port = bound.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            app = application(self.pool, TOKEN, **self.options)
            server = _server(app, fd=bound.fileno(), timeout_graceful_shutdown=self.grace)
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.005)
            try:
                async with aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=60)) as client:
                    yield client
            finally:
                server.should_exit = True
                await task
        assert not self.pool.residents
