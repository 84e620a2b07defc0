"""A pool's web application: the OpenAI routes passed on, and those of its own under ``/v1/thaw``."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from typing import Any, cast
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from ..engines.vllm.kv.access import TOKEN_HEADER
from ..errors import StorageError, ThawError, UsageError
from .config import Model
from .directories import Directories, PathError
from .engine import ServerEngine
from .metrics import Counted, exposition
from .pool import Pool
from .resident import UnavailableError, UnknownModelError
from .router import Refused, Router

HOSTS = ("localhost",)
"""What callers may call this server, for the routes behind the admin token, beside its addresses: another name that
leads here is an attack on a browser (DNS rebinding)."""


def application(
    pool: Pool,
    token: str,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    directories: Sequence[str] = (),
) -> FastAPI:
    """The ASGI application; engines run as long as its lifespan.

    Args:
        token: what the routes of its own ask for.
        api_keys: as of ``Router``.
        hosts: further names of this server.
        directories: in which requests may name models and snapshots.

    Raises:
        StorageError: one of them is not there.
    """
    router = Router(pool, api_keys)
    own = Routes(pool, router, Directories(directories))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pool.running():
            yield

    app = FastAPI(title="thaw", lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages load from elsewhere
    access = Access(token, {*HOSTS, *hosts})
    app.add_exception_handler(ThawError, _told)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/health", own.health)
    app.add_api_route("/v1/models", own.models, tags=["OpenAI"])
    app.add_api_route("/metrics", own.metrics)
    for path, work, method in (
        ("status", own.status, "GET"),
        ("models", own.states, "GET"),
        ("models", own.register, "POST"),
        ("models/{name:path}/kv/freeze", own.freeze_kv, "POST"),
        ("models/{name:path}/kv/restore", own.restore_kv, "POST"),
        ("snapshots", own.snapshots, "GET"),
        ("models/{name:path}/load", own.load, "POST"),
        ("models/{name:path}/park", own.park, "POST"),
        ("models/{name:path}/unload", own.unload, "POST"),
        ("events", own.events, "GET"),
    ):
        app.add_api_route(
            f"/v1/thaw/{path}", work, methods=[method], tags=["thaw"], dependencies=[Depends(access.require)]
        )
    app.mount("/", router)
    return app


class Registration(BaseModel):
    """A model to be served; paths are relative to a directory of the server's.

    Attributes:
        name: what requests call it.
        path: the model directory.
        snapshot: its weights.
        like: the model whose options it has; none: vLLM's.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str
    snapshot: str | None = None
    like: str | None = None


class Access:
    """Who may use the routes of the pool's own."""

    def __init__(self, token: str, hosts: Collection[str]) -> None:
        self._token, self._hosts = token.encode(), {host.lower() for host in hosts}

    def require(self, request: Request) -> None:
        """Raises:
        Refused: this caller may not.
        """
        called = request.headers.get("host", "")
        try:
            name = urlsplit(f"//{called}").hostname or ""
        except ValueError:
            name = ""
        if name not in self._hosts and not _is_address(name):
            raise Refused(403, "Forbidden", f"this server is not called {called!r}; see --allowed-host")
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host')}":
            raise Refused(403, "Forbidden", "other sites may not ask this server")
        if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self._token):
            raise Refused(403, "Forbidden", f"send the admin token in the header {TOKEN_HEADER}")


def _is_address(name: str) -> bool:
    """An address is no name that somebody else could have lead here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Routes:
    """What the pool answers itself."""

    def __init__(self, pool: Pool, router: Router, directories: Directories) -> None:
        self._pool, self._router, self._directories = pool, router, directories
        self._started, self._counted = int(time.time()), Counted()
        pool.events.listeners.append(self._counted.note)

    async def health(self) -> PlainTextResponse:
        """Whether requests are taken; engines come and go."""
        return PlainTextResponse("")

    async def models(self, request: Request) -> JSONResponse:
        """What is served, whether it is there now or not."""
        self._router.require_key(request.headers.get("authorization", "").encode() or None)
        found = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "thaw"} for name in self._pool.models
        ]
        return JSONResponse({"object": "list", "data": found})

    async def metrics(self) -> PlainTextResponse:
        """Prometheus: every engine's own, and the pool's."""
        body, kind = await exposition(self._pool, self._counted)
        return PlainTextResponse(body, media_type=kind)

    async def status(self) -> dict[str, Any]:
        """Models, engines, and who waits."""
        return document(self._pool)

    async def states(self) -> dict[str, Any]:
        """Models by name."""
        return {"models": document(self._pool)["models"]}

    async def register(self, body: Registration) -> dict[str, Any]:
        """Serve one more model, out of the server's directories; options are those of a model that is served."""
        path = await asyncio.to_thread(self._directories.path, body.path)
        snapshot = None if body.snapshot is None else await asyncio.to_thread(self._directories.path, body.snapshot)
        like = None if body.like is None else self._pool.models.get(body.like)
        if body.like is not None and like is None:
            raise UnknownModelError(f"there is no model {body.like!r}")
        taken = Model(body.name, str(path))
        if like is not None:
            taken = replace(like, name=body.name, path=str(path), pinned=False, minimum=0)
        self._pool.register(replace(taken, snapshot=None if snapshot is None else str(snapshot)))
        return {"model": body.name}

    async def snapshots(self) -> dict[str, Any]:
        """Snapshots in the server's directories, and what their headers say."""
        return {"snapshots": await asyncio.to_thread(lambda: list(self._directories.snapshots()))}

    async def freeze_kv(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/kv/freeze of a model's server."""
        return await self._asked(name, "kv/freeze", await request.body())

    async def restore_kv(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/kv/restore of a model's server."""
        return await self._asked(name, "kv/restore", await request.body())

    async def _asked(self, name: str, what: str, body: bytes) -> JSONResponse:
        async with self._pool.lease(name) as one:
            status, answer = await cast(ServerEngine, one.engine).ask(what, body)
        return JSONResponse(answer, status)

    async def load(self, name: str) -> dict[str, Any]:
        """Have a model there."""
        start = time.monotonic()
        await self._pool.load(name)
        return {"model": name, "seconds": round(time.monotonic() - start, 3)}

    async def park(self, name: str) -> dict[str, Any]:
        """Let a model's requests end, and give its memory back."""
        await self._pool.unload(name, park=True)
        return {"model": name}

    async def unload(self, name: str) -> dict[str, Any]:
        """Let a model's requests end, and stop it."""
        await self._pool.unload(name)
        return {"model": name}

    async def events(self, request: Request, after: int | None = None) -> StreamingResponse:
        """What happens, as server-sent events; ``after`` and Last-Event-ID say which are known."""
        last = request.headers.get("last-event-id", "")
        since = int(last) if last.isascii() and last.isdecimal() else after

        async def stream() -> AsyncIterator[str]:
            async for event in self._pool.events.follow(since):
                yield f"id: {event.number}\ndata: {json.dumps(event.document())}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def document(pool: Pool) -> dict[str, Any]:
    """The pool as plain values."""
    waiting = pool.waiting
    engines = [
        {
            "model": one.model.name,
            "state": one.state.value,
            "pid": one.engine.pid,
            "share": one.share,
            "requests": one.inflight,
            "host_bytes": one.host_bytes if one.away else None,
            "idle_seconds": 0.0 if one.inflight else round(max(0.0, time.monotonic() - one.used), 1),
        }
        for one in pool.residents
    ]
    models = {
        name: {
            "states": [engine["state"] for engine in engines if engine["model"] == name],
            "waiting": waiting.get(name, 0),
            "pinned": model.pinned,
            "minimum": model.minimum,
            "maximum": model.maximum,
            "share": model.share,
            "snapshot": model.snapshot is not None,
            "expected_seconds": pool.expected(model),
            "failure": pool.failure(name),
        }
        for name, model in pool.models.items()
    }
    return {"models": models, "engines": engines, "waiting": sum(waiting.values())}


STATUS: dict[type[Exception], int] = {UnknownModelError: 404, StorageError: 404, PathError: 400, UsageError: 409}
"""The status of an error is that of the first class of its ancestry that is here; 503 otherwise."""


async def _told(request: Request, error: Exception) -> JSONResponse:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 503)
    headers = {"Retry-After": str(int(error.retry_after) + 1)} if isinstance(error, UnavailableError) else None
    return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'the body'}: {one['msg']}" for one in error.errors())
    return JSONResponse({"error": {"type": "UsageError", "message": said}}, 400)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return error.response()
