"""A pool's web application: the OpenAI routes passed on, and those of its own under ``/v1/thaw``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..engines.vllm.kv.access import TOKEN_HEADER
from ..engines.vllm.kv.bodies import CheckingOut, Checkpointing, Freezing, Restoring
from ..engines.vllm.kv.description import Refusal, refusals, taken
from ..errors import StorageError, ThawError, UnknownSessionError, UsageError
from .access import Access
from .bodies import REFUSED, parsed
from .config import Model
from .directories import Directories, PathError
from .engine import ServerEngine
from .events import Event
from .kept_sessions import KeptSessions
from .metrics import Counted, exposition
from .overview import Overview, What
from .page import Page
from .pool import Pool
from .resident import UnavailableError, UnknownModelError
from .router import Refused, Router

ALIVE = 15.0
"""Seconds between two signs of life where nothing happens; who has logged out is let go by then."""
LONGEST_NUMBER = 18
"""Digits of an event's."""
EVENT_STREAM = "text/event-stream"

# What follows is for the description of the routes alone.
TOKEN = APIKeyHeader(name=TOKEN_HEADER, scheme_name="admin token", auto_error=False)
API_KEY = HTTPBearer(scheme_name="API key", auto_error=False)
"""``Access`` and ``Router`` ask for them."""
OF_SERVERS = (400, 404, 409, 413, 422, 500, 501, 503, 507)
"""Statuses with which a model's server may refuse what it is asked."""
FAULT = {"default": {"model": Refusal, "description": "A fault of the server"}}
"""Without it FastAPI tells of a 422 where a route has parameters; what is wrong with those is answered 400."""
STREAM = {200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}}


def application(
    pool: Pool,
    token: str,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    directories: Sequence[str] = (),
    kv_directory: str | None = None,
    sessions_directory: str | None = None,
) -> FastAPI:
    """The ASGI application; engines run as long as its lifespan.

    Args:
        token: what the routes of its own ask for.
        api_keys: as of ``Router``.
        hosts: further names of this server.
        directories: in which requests may name models and snapshots.
        kv_directory: in which engines have their files of KV blocks.
        sessions_directory: of the store in which they keep sessions.

    Raises:
        StorageError: one of them is not there.
    """
    router = Router(pool, api_keys)
    access, allowed = Access(token, hosts), Directories(directories)
    overview, kept = Overview(pool, allowed, kv_directory), KeptSessions(sessions_directory)
    own = Routes(pool, router, access, allowed, overview)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pool.running():
            try:
                yield
            finally:
                await overview.verification.end()

    # The pages of its documentation load from elsewhere.
    app = FastAPI(title="thaw", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _no_method)
    app.add_exception_handler(ThawError, _told)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)
    app.add_api_route("/health", own.health, response_class=PlainTextResponse)
    key = {"dependencies": [Security(API_KEY)], "responses": refusals(401)} if api_keys else {}
    app.add_api_route("/v1/models", own.models, tags=["OpenAI"], **key)
    app.add_api_route("/metrics", own.metrics, response_class=PlainTextResponse)
    more: dict[Any, dict[str, Any]] = {
        own.register: {"openapi_extra": taken(Registration)},
        own.freeze_kv: {"openapi_extra": taken(Freezing)},
        own.restore_kv: {"openapi_extra": taken(Restoring)},
        own.checkpoint: {"openapi_extra": taken(Checkpointing)},
        own.checkout: {"openapi_extra": taken(CheckingOut)},
        overview.verify: {"openapi_extra": taken(What), "status_code": 202},
        own.events: {"response_class": Response},
    }
    token_alone, page_too = Depends(access.require), Depends(access.require_or_session)
    for path, work, method, allowed_for, *statuses in (
        ("status", own.status, "GET", page_too),
        ("models", own.states, "GET", page_too),
        ("models", own.register, "POST", token_alone, *REFUSED, 404, 409),
        ("models/{name:path}/kv/freeze", own.freeze_kv, "POST", token_alone, *OF_SERVERS),
        ("models/{name:path}/kv/restore", own.restore_kv, "POST", token_alone, *OF_SERVERS),
        ("models/{name:path}/sessions/checkpoint", own.checkpoint, "POST", token_alone, *OF_SERVERS),
        ("models/{name:path}/sessions/checkout", own.checkout, "POST", token_alone, *OF_SERVERS),
        ("models/{name:path}/load", own.load, "POST", page_too, 404, 503),
        ("models/{name:path}/park", own.park, "POST", page_too, 404, 409),
        ("models/{name:path}/unload", own.unload, "POST", page_too, 404, 409),
        ("events", own.events, "GET", page_too, 400),
        ("usage", overview.usage, "GET", page_too),
        ("starts", overview.starts, "GET", page_too),
        ("snapshots", overview.snapshots, "GET", page_too),
        ("kv", overview.kv_files, "GET", page_too),
        ("sessions", kept.listed, "GET", page_too, 404, 422),
        ("sessions/diff", kept.difference, "GET", page_too, 400, 404, 409, 422),
        ("verify", overview.verified, "GET", page_too),
        ("verify", overview.verify, "POST", page_too, *REFUSED, 404, 409),
        ("verify/cancel", overview.cancel, "POST", page_too),
    ):
        app.add_api_route(
            f"/v1/thaw/{path}",
            work,
            methods=[method],
            tags=["thaw"],
            dependencies=[allowed_for, Security(TOKEN)],
            responses=refusals(403, *statuses) | FAULT | (STREAM if work == own.events else {}),
            **more.get(work, {}),
        )
    Page(access).add_to(app)
    app.router.default = router
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


class Routes:
    """What the pool answers itself."""

    def __init__(
        self, pool: Pool, router: Router, access: Access, directories: Directories, overview: Overview
    ) -> None:
        self._overview = overview
        self._pool, self._router, self._access, self._directories = pool, router, access, directories
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
        body, kind = await exposition(self._pool, self._counted, (await self._overview.starts())["starts"])
        return PlainTextResponse(body, media_type=kind)

    async def status(self) -> dict[str, Any]:
        """Models, engines, and who waits."""
        return document(self._pool)

    async def states(self) -> dict[str, Any]:
        """Models by name."""
        return {"models": document(self._pool)["models"]}

    async def register(self, request: Request) -> dict[str, Any]:
        """Serve one more model, out of the server's directories; options are those of a model that is served."""
        body = await parsed(request, Registration)
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

    async def freeze_kv(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/kv/freeze of a model's server."""
        return await self._asked(name, "kv/freeze", await request.body())

    async def restore_kv(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/kv/restore of a model's server."""
        return await self._asked(name, "kv/restore", await request.body())

    async def checkpoint(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/sessions/checkpoint of a model's server."""
        return await self._asked(name, "sessions/checkpoint", await request.body())

    async def checkout(self, name: str, request: Request) -> JSONResponse:
        """/v1/thaw/sessions/checkout of a model's server."""
        return await self._asked(name, "sessions/checkout", await request.body())

    async def _asked(self, name: str, what: str, body: bytes) -> JSONResponse:
        async with self._pool.lease(name) as one:
            status, answer = await cast(ServerEngine, one.engine).ask(what, body)
        if status >= 400 and not isinstance(answer.get("error"), dict):
            raise ThawError(f"the server of {name!r} answered {status}")
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
        known = last.isascii() and last.isdecimal() and len(last) <= LONGEST_NUMBER
        since = int(last) if known else after

        session = self._access.session(request)

        async def stream() -> AsyncIterator[str]:
            events = self._pool.events.follow(since)
            coming: asyncio.Future[Event] | None = None
            try:
                while session is None or self._access.sessions.left(session):
                    coming = coming or asyncio.ensure_future(anext(events))
                    await asyncio.wait({coming}, timeout=ALIVE)
                    if not coming.done():
                        yield ": \n\n"
                        continue
                    event, coming = coming.result(), None
                    yield f"id: {event.number}\ndata: {json.dumps(event.document())}\n\n"
            except StopAsyncIteration:
                return
            finally:
                if coming is not None:
                    coming.cancel()

        return StreamingResponse(stream(), media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})


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
            "parkable": not one.model.least and one.may_park(),
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
            "snapshot": pool.snapshot(name) is not None,
            "expected_seconds": pool.expected(model),
            "failure": pool.failure(name),
        }
        for name, model in pool.models.items()
    }
    return {"time": round(time.time(), 3), "models": models, "engines": engines, "waiting": sum(waiting.values())}


STATUS: dict[type[Exception], int] = {
    UnknownModelError: 404,
    StorageError: 404,
    PathError: 400,
    UnknownSessionError: 404,
    UsageError: 409,
}
"""The status of an error is that of the first class of its ancestry that is here; 503 otherwise."""


async def _told(request: Request, error: Exception) -> JSONResponse:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 503)
    headers = {"Retry-After": str(int(error.retry_after) + 1)} if isinstance(error, UnavailableError) else None
    return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, status, headers)


async def _no_method(request: Request, error: Exception) -> JSONResponse:
    """Of a route that has others."""
    assert isinstance(error, HTTPException)
    found = (route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL)
    message = f"there is no {request.method} {request.scope['path']} here"
    answer = Refused(error.status_code, "MethodNotAllowedError", message).response()
    answer.headers["Allow"] = ", ".join(sorted({method for route in found for method in route.methods}))
    return answer


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """The web server logs it."""
    return Refused(500, "InternalServerError", "this is a fault of the server; its log has more").response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'the body'}: {one['msg']}" for one in error.errors())
    return JSONResponse({"error": {"type": "UsageError", "message": said}}, 400)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return error.response()
