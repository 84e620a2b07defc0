"""Entry point of the group ``vllm.endpoint_plugins``: routes of vLLM's own server that freeze and restore KV blocks;
those of sessions (``sessions/routes.py``), and those of the engine as a whole (``swap/routes.py``).

The contract is vllm/plugins/endpoint_plugins/interface.py. vLLM loads it only where ``VLLM_PLUGINS`` names it; its name
is the general plugin's, so that neither is loaded without the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.requests import Request

from ....errors import (
    BusyError,
    DeviceError,
    ExistsError,
    FormatError,
    MismatchError,
    SpaceError,
    ThawError,
    UnsupportedError,
    UsageError,
)
from .. import versions
from ..client import ask, install
from ..sessions.routes import Sessions
from ..swap.routes import Engine
from .access import TOKEN_HEADER, Access
from .bodies import (
    LARGEST_BODY,
    Branching,
    CheckingOut,
    Checkpointing,
    Freezing,
    Parking,
    Restoring,
    Swapping,
    Waking,
    parse,
)
from .description import refusals, taken

logger = logging.getLogger(__name__)

STATUS: dict[type[ThawError], int] = {
    UsageError: 400,
    ExistsError: 409,
    MismatchError: 409,
    FormatError: 422,
    BusyError: 409,
    UnsupportedError: 501,
    DeviceError: 503,
    SpaceError: 507,
    ThawError: 500,
}
"""The status of an error is that of the first class of its ancestry that is here."""
_ASKING = (403, *STATUS.values())
_READING = (403, 422, 500)
_TAKING = (*_ASKING, 413)
_NAMING = (*_TAKING, 404)
"""With what a route may refuse that asks the engine core; that only reads a store; that takes a body, too; that names a
file, too."""


class _Refused(Exception):
    """An answer that is no error of thaw's."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass(frozen=True)
class _Served:
    access: Access
    client: Any
    engine: Engine

    @property
    def sessions(self) -> Sessions:
        """Of a server that keeps some."""
        assert self.access.sessions is not None
        return Sessions(self.client, self.access.sessions)


REFUSAL: dict[str, Callable[[Access, str | None], str | None]] = {
    "kv": Access.refusal,
    "sessions": Access.session_refusal,
    "engine": Access.stranger,
}
"""Who may not use a route, by the first part of its path."""


class KVRoutes:
    """What vLLM's API server asks of an endpoint plugin."""

    name = "thaw"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; what they need is known later, in ``init_state``."""
        for path, work, body, statuses, summary in (
            ("kv/info", _info, None, _ASKING, "What is cached"),
            ("kv/freeze", _freeze, Freezing, _TAKING, "Write cached prefixes to a file"),
            ("kv/restore", _restore, Restoring, _NAMING, "Bring the prefixes of a file back"),
            ("sessions", _sessions, None, _READING, "Which sessions are kept"),
            ("sessions/checkpoint", _checkpoint, Checkpointing, _TAKING, "Keep what a conversation has come to"),
            ("sessions/checkout", _checkout, CheckingOut, _TAKING, "Bring the blocks of a session back"),
            ("sessions/branch", _branch, Branching, _TAKING, "Make a session from the first tokens of another"),
            ("engine/state", _state, None, (403,), "Whether the engine is parked, and whose weights it has"),
            ("engine/swap", _swap, Swapping, _NAMING, "Fill the engine with another snapshot's weights"),
            ("engine/park", _park, Parking, _TAKING, "Give the GPU's memory back"),
            ("engine/wake", _wake, Waking, _TAKING, "Take it again"),
        ):
            app.add_api_route(
                f"/v1/thaw/{path}",
                _answering(work, REFUSAL[path.partition("/")[0]]),
                methods=["GET" if body is None else "POST"],
                summary=summary,
                tags=["thaw"],
                responses=refusals(*statuses),
                openapi_extra=_described(body),
            )

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Remember the engine, and what the operator allows; where that is anything, a restore is to be expected."""
        install()
        access = Access.from_environment()
        fronts = int(getattr(args, "api_server_count", None) or 1)
        state.thaw_kv = _Served(access, engine_client, Engine(engine_client, fronts, versions.renaming(state)))
        if access.token is not None and access.refusal(access.token) is None:
            state.thaw_kv_ready = asyncio.create_task(_make_ready(engine_client))  # the server starts meanwhile


def _described(body: type | None) -> dict[str, Any]:
    """Of a route: the header that it wants, and the body."""
    token = {"name": TOKEN_HEADER, "in": "header", "required": True, "schema": {"type": "string"}}
    of_body = {} if body is None else taken(body, required=body not in (Parking, Waking))
    return {"parameters": [token]} | of_body


async def _make_ready(client: Any) -> None:
    """A server is not to fail, or to wait, for what makes its first restore faster."""
    try:
        await ask(client, "thaw_kv_expect", {})
    except Exception as error:
        logger.warning("the first restore of KV blocks will take longer: %s", error)


def _answering(
    work: Callable[[Request, _Served], Awaitable[dict[str, Any]]],
    refusal: Callable[[Access, str | None], str | None],
) -> Callable[[Request], Awaitable[JSONResponse]]:
    async def answer(request: Request) -> JSONResponse:
        served: _Served = request.app.state.thaw_kv
        try:
            why = refusal(served.access, request.headers.get(TOKEN_HEADER))
            if why is not None:
                raise _Refused(403, "Forbidden", why)
            return JSONResponse(await work(request, served))
        except _Refused as refused:
            return _error(refused.status, refused.kind, str(refused))
        except ThawError as error:
            status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
            return _error(status, type(error).__name__, str(error))

    return answer


def _error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status)


async def _info(request: Request, served: _Served) -> dict[str, Any]:
    return await _call(served, "thaw_kv_info", {})


async def _freeze(request: Request, served: _Served) -> dict[str, Any]:
    served.engine.require_awake()
    body = await asyncio.to_thread(parse, await _body(request), Freezing)
    path, prefixes = served.access.target(body.name, body.force), None
    if body.prompts is not None:
        tokens = [await versions.completion_tokens(served.client, text) for text in body.prompts]
        prefixes = [{"tokens": ids, "salt": body.cache_salt} for ids in tokens]
    elif body.token_ids is not None:
        prefixes = [{"tokens": ids, "salt": body.cache_salt} for ids in body.token_ids]
    return await _call(
        served,
        "thaw_kv_freeze",
        {
            "path": path,
            "force": body.force,
            "prefixes": prefixes,
            "request": body.request,
            "model": body.model_id,
            "background": True,
        },
    )


async def _restore(request: Request, served: _Served) -> dict[str, Any]:
    body = parse(await _body(request), Restoring)
    path = served.access.path_of(body.name)
    if not os.path.isfile(path):
        raise _Refused(404, "StorageError", f"there is no file {body.name!r} in the server's directory")
    return await _call(served, "thaw_kv_restore", {"path": path, "model": body.model_id, "evict": body.evict})


async def _sessions(request: Request, served: _Served) -> dict[str, Any]:
    return await served.sessions.listed()


async def _checkpoint(request: Request, served: _Served) -> dict[str, Any]:
    body = await asyncio.to_thread(parse, await _body(request), Checkpointing)
    await _require_awake(served)
    return await served.sessions.checkpoint(body)


async def _checkout(request: Request, served: _Served) -> dict[str, Any]:
    body = parse(await _body(request), CheckingOut)
    await _require_awake(served)
    return await served.sessions.checkout(body)


async def _branch(request: Request, served: _Served) -> dict[str, Any]:
    return await served.sessions.branch(parse(await _body(request), Branching))


async def _body(request: Request) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise _Refused(413, "UsageError", f"the body is larger than {LARGEST_BODY} bytes; freeze in several files")
    return bytes(raw)


async def _state(request: Request, served: _Served) -> dict[str, Any]:
    return served.engine.state() | {"snapshot": await served.engine.source()}


async def _swap(request: Request, served: _Served) -> dict[str, Any]:
    body = parse(await _body(request), Swapping)
    if not os.path.isfile(served.access.snapshot(body.name)):
        raise _Refused(404, "StorageError", f"there is no snapshot {body.name!r} in the server's directory")
    return await served.engine.swap(body, served.access)


async def _park(request: Request, served: _Served) -> dict[str, Any]:
    return await served.engine.park(parse(await _body(request) or b"{}", Parking), served.access)


async def _wake(request: Request, served: _Served) -> dict[str, Any]:
    return await served.engine.wake(parse(await _body(request) or b"{}", Waking))


async def _call(served: _Served, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Ask the engine core; its paths become names, which is what callers know."""
    await _require_awake(served)
    answer = await ask(served.client, method, options)
    if "path" in answer:
        answer = {"name": os.path.basename(answer["path"])} | {k: v for k, v in answer.items() if k != "path"}
    if "files" in answer:
        answer["files"] = [os.path.basename(path) for path in answer["files"]]
    return answer


async def _require_awake(served: _Served) -> None:
    """Raises:
    UsageError: the engine is parked, or asleep.
    """
    served.engine.require_awake()
    if await served.client.is_sleeping():
        raise UsageError("the engine is asleep and its cache is empty; wake it up first")
