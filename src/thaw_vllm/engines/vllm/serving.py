"""What ``thaw serve`` adds to vLLM's own server: thaw's routes, cached prefixes before it is healthy, and a line that
says that it is ready.

ASGI middleware, vLLM's option ``--middleware``: an endpoint plugin would need ``VLLM_PLUGINS``, which keeps out every
plugin that it does not name. Where the plugin is there already, the routes are its.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ...errors import ThawError, UnsupportedError
from . import start_report
from .client import ask
from .kv.routes import KVRoutes
from .serve_variables import KV_VARIABLE, START_VARIABLE, TOKEN_FILE_VARIABLE

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Additions:
    """Passes everything on, and does its work while the server starts."""

    def __init__(self, app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        server: FastAPI = scope["app"]
        try:
            restored = await _begin(server)
            weights = await _weights(server)
        except Exception as error:  # any other answer counts as "no lifespan here", and the server would come up
            await receive()
            if not isinstance(error, ThawError):
                logger.exception("thaw's part of the start failed")
            print(f"thaw: {error}", file=sys.stderr, flush=True)
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return

        async def told(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                await asyncio.to_thread(_say_ready, server, weights, restored)

        await self.app(scope, receive, told)


async def _begin(server: FastAPI) -> str | None:
    """Routes, and the prefixes; what is to be said of these.

    Raises:
        ThawError: the prefixes cannot be restored.
    """
    client = getattr(server.state, "engine_client", None)
    if client is None or "generate" not in await client.get_supported_tasks():
        if os.environ.get(KV_VARIABLE):
            raise UnsupportedError("a model that does not generate has no cached prefixes; leave --kv-snapshot out")
        return None
    if not hasattr(server.state, "thaw_kv"):
        routes = KVRoutes()
        routes.attach_router(server)
        await routes.init_state(client, server.state, server.state.args)
    path = os.environ.get(KV_VARIABLE)
    if not path:
        return None
    told = await ask(client, "thaw_kv_restore", {"path": path, "model": None, "evict": False})
    return f"{told['blocks'] + told['present']} blocks of KV cache restored"


async def _weights(server: FastAPI) -> str | None:
    """How the model got them, where thaw's loader was asked."""
    client: Any = getattr(server.state, "engine_client", None)
    try:
        found = (await client.collective_rpc("thaw_outcome"))[0]
        said = {"thawed": f"weights thawed from {found['path']}", "frozen": f"weights frozen to {found['path']}"}
        return said.get(found["how"], f"weights loaded by vLLM{': ' if found['why'] else ''}{found['why']}")
    except Exception as error:  # of no importance to those who ask the server
        logger.debug("how the weights were loaded cannot be told: %s", error)
        return None


def _say_ready(server: FastAPI, weights: str | None, restored: str | None) -> None:
    args = server.state.args
    where = f"unix:{args.uds}" if getattr(args, "uds", None) else f"http://{args.host or '127.0.0.1'}:{args.port}"
    said = [f"ready at {where}{_after()}"]
    said += [told for told in (weights, restored) if told is not None]
    file = os.environ.get(TOKEN_FILE_VARIABLE)
    if file:
        said.append(f"the admin token is in {file}")
    print(f"thaw: {'; '.join(said)}", file=sys.stderr, flush=True)


def _after() -> str:
    directory = os.environ.get(START_VARIABLE)
    try:
        report = start_report.read(Path(directory)) if directory else None
    except (ThawError, OSError, ValueError) as error:  # of no importance to those who ask the server
        logger.warning("how long the start took cannot be told: %s", error)
        return ""
    if report is None:
        return ""
    longest = sorted(report.seconds.items(), key=lambda one: -one[1])[:4]
    return f" after {report.total:.1f} s ({', '.join(f'{name} {seconds:.1f}' for name, seconds in longest)})"
