"""The front of a pool: reads which model a request is for, waits for an engine that holds it, and passes bytes through.

Nothing of a request or an answer is changed: parameters, streaming, tool calls and errors are vLLM's own. ASGI.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from starlette.responses import JSONResponse
from yarl import URL

from ..errors import ThawError
from .engine import ServerEngine
from .pool import Pool
from .resident import UnavailableError, UnknownModelError

logger = logging.getLogger("thaw.serve")

LARGEST_BODY = 64 * 1024 * 1024
"""Bytes of a request."""
BODY_LIMIT = 60.0
"""Seconds in which a body has to be there."""
DEADLINE_HEADER = b"x-thaw-deadline"
"""Seconds that this request may wait for its model, at most the model's own."""
_LARGE = 256 * 1024
"""Bytes of a body that is parsed in a thread."""
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect", DEADLINE_HEADER),
    }
)
"""Headers of one connection; RFC 9110, 7.6.1."""
_KEPT_BACK = _HOP_BY_HOP - {b"content-length"}

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
"""What no header may hold; RFC 9110, 5.5."""
_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that the HTTP client would add where there are none."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """An answer of the router's own."""

    def __init__(self, status: int, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, retry_after

    def response(self) -> JSONResponse:
        """As vLLM words an error."""
        message = str(self).encode(errors="backslashreplace").decode()  # it may repeat half a surrogate pair
        error = {"message": message, "type": self.kind, "param": None, "code": self.status}
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse({"error": error}, self.status, headers)


@dataclass
class _Exchange:
    """How far an answer is.

    Attributes:
        begun: its head was sent.
        answered: its last bytes are being sent; the client may leave then.
    """

    begun: bool = False
    answered: bool = False


class _GoneError(Exception):
    """The client has left."""


class Router:
    """An ASGI application for every path that is not the pool's own."""

    def __init__(self, pool: Pool, api_keys: Sequence[str] = ()) -> None:
        """
        Args:
            api_keys: one of them must be sent, where there are any; engines ask for them again.
        """
        self._pool, self._keys = pool, [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not through this server"})
            return
        try:
            await self._serve(scope, receive, send)
        except Refused as refused:
            await refused.response()(scope, receive, send)
        except _GoneError:
            logger.debug("a client left before it was answered: %s", scope["path"])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self.require_key(headers.get(b"authorization"))
        if scope["path"].startswith("/v1/thaw/"):
            raise Refused(
                404, "NotFoundError", "several models are served here; see /v1/thaw/models/NAME/… (docs/cli.md)"
            )
        if scope["method"] != "POST":
            raise Refused(404, "NotFoundError", f"there is no {scope['method']} {scope['path']} here")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":  # a page of another site may not send that without being asked first
            raise Refused(415, "UnsupportedMediaType", "send JSON, and say so: Content-Type: application/json")
        body = await _body(headers, receive)
        name = await self._model(body)
        exchange = _Exchange()
        work = asyncio.ensure_future(self._pass_on(scope, headers, body, name, send, exchange))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.answered:
                raise _GoneError
            try:
                await work
            except ThawError as error:
                logger.warning("an answer was cut: %s", error)  # the web server closes what has no end
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    def require_key(self, authorization: bytes | None) -> None:
        """Raises:
        Refused: there are keys, and this is none.
        """
        scheme, _, given = (authorization or b"").partition(b" ")
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if self._keys and not (scheme.lower() == b"bearer" and any(matches)):
            raise Refused(401, "Unauthorized", "send one of the server's API keys as a bearer token")

    async def _model(self, body: bytes) -> str:
        try:
            if len(body) > _LARGE:
                found = await asyncio.to_thread(json.loads, body)
            else:
                found = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "BadRequestError", "the body is not JSON") from None
        name = found.get("model") if isinstance(found, dict) else None
        if name is None and isinstance(found, dict) and len(self._pool.models) == 1:
            return next(iter(self._pool.models))  # as vLLM's own server does
        if not isinstance(name, str) or not name:
            raise Refused(400, "BadRequestError", "the body names no model")
        return name

    async def _pass_on(
        self, scope: Scope, headers: dict[bytes, bytes], body: bytes, name: str, send: Send, exchange: _Exchange
    ) -> None:
        try:
            async with self._pool.lease(name, _deadline(headers)) as one:
                await _forward(cast(ServerEngine, one.engine), scope, body, send, exchange)
        except UnknownModelError:
            raise Refused(404, "NotFoundError", f"The model `{name}` does not exist.") from None
        except UnavailableError as error:
            if exchange.begun:  # half an answer must not look like a whole one: the connection is cut
                raise
            raise Refused(503, "ServiceUnavailableError", str(error), error.retry_after) from None


async def _forward(engine: ServerEngine, scope: Scope, body: bytes, send: Send, exchange: _Exchange) -> None:
    session = engine.session
    assert session is not None
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope["query_string"]
    target = path.decode("ascii") + (f"?{query.decode('ascii')}" if query else "")
    given = [*_passed(scope["headers"]), ("authorization", f"Bearer {engine.key}")]
    try:
        async with session.request(
            scope["method"],
            URL(f"http://engine{target}", encoded=True),
            data=body,
            headers=given,
            skip_auto_headers=_ADDED,
            allow_redirects=False,
        ) as answer:
            kept = [(key.lower(), value) for key, value in answer.raw_headers if key.lower() not in _KEPT_BACK]
            exchange.begun = True
            await send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            exchange.answered = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError, RuntimeError) as error:
        if exchange.begun:
            raise ThawError(f"the engine of {engine.model.name!r} has gone in the middle of an answer") from error
        raise Refused(
            502, "BadGatewayError", f"the engine of {engine.model.name!r} has gone; send the request again", 1
        ) from None


def _passed(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """A request's headers for the engine, without those of this connection, the caller's API key, and cookies: those
    are the page's.

    Raises:
        Refused: one is not UTF-8, or holds control characters.
    """
    named = b",".join(value for key, value in headers if key == b"connection").lower().split(b",")
    own = {*_HOP_BY_HOP, b"authorization", b"cookie", *(name.strip() for name in named)}
    try:
        passed = [(key.decode(), value.decode()) for key, value in headers if key not in own]
    except UnicodeDecodeError:
        raise Refused(400, "BadRequestError", "a header is not UTF-8") from None
    if any(_CONTROL.search(value) for _, value in passed):  # not every web server refuses them
        raise Refused(400, "BadRequestError", "a header holds control characters")
    return passed


async def _body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    try:
        announced = int(headers.get(b"content-length", b"0"))
    except ValueError:
        raise Refused(400, "BadRequestError", "Content-Length is no number") from None
    too_large = Refused(413, "BadRequestError", f"the body is larger than {LARGEST_BODY} bytes")
    if announced > LARGEST_BODY:
        raise too_large
    try:
        return await asyncio.wait_for(_read(receive, too_large), BODY_LIMIT)
    except asyncio.TimeoutError:
        raise Refused(408, "RequestTimeout", f"the body was not there within {BODY_LIMIT:.0f} s") from None


async def _read(receive: Receive, too_large: Refused) -> bytes:
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        found += message.get("body", b"")
        if len(found) > LARGEST_BODY:
            raise too_large
        if not message.get("more_body", False):
            return bytes(found)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _deadline(headers: dict[bytes, bytes]) -> float | None:
    given = headers.get(DEADLINE_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise Refused(400, "BadRequestError", f"{DEADLINE_HEADER.decode()} must be seconds, from 0 on")
    return seconds
