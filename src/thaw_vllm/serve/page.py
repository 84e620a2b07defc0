"""The page of a pool, ``/thaw``: its files, logging in and out. What it shows are documents of routes of their own.

Everything is served from the package; the headers forbid a browser to load, send or be framed by anything else.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict

from .. import __version__
from .access import Access, cookie_name
from .bodies import parsed
from .router import Refused
from .sessions import LIFETIME

logger = logging.getLogger("thaw.serve")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


class Login(BaseModel):
    """What the form sends."""

    model_config = ConfigDict(extra="forbid")

    token: str


@dataclass(frozen=True)
class File:
    """One of the page's, held in memory: no request leads to a path."""

    content: bytes
    kind: str
    tag: str


class Page:
    """Its routes."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._server = secrets.token_hex(8)  # tells the page that another server has taken this one's place
        self._files = dict(_packaged())

    def add_to(self, app: FastAPI) -> None:
        """Routes that are in no API: the page's own."""
        for path, work, method in (
            ("", self.page, "GET"),
            ("/", self.moved, "GET"),
            ("/static/{name:path}", self.file, "GET"),
            ("/session", self.session, "GET"),
            ("/login", self.log_in, "POST"),
            ("/logout", self.log_out, "POST"),
        ):
            app.add_api_route(f"/thaw{path}", work, methods=[method], include_in_schema=False)

    async def page(self, request: Request) -> Response:
        """The page, and without a session nothing but the form to log in."""
        self._access.require_host(request)
        known = self._access.session(request) is not None
        file = self._files["index.html" if known else "login.html"]
        return Response(file.content, media_type=file.kind, headers=HEADERS | {"Cache-Control": "no-store"})

    async def moved(self, request: Request) -> Response:
        """The page's links are relative, and want it without a slash."""
        self._access.require_host(request)
        return RedirectResponse("../thaw", headers=HEADERS)

    async def file(self, name: str, request: Request) -> Response:
        """A script or a style sheet."""
        self._access.require_host(request)
        file = self._files.get(name)
        if file is None or file.kind == TYPES["html"]:
            raise Refused(404, "NotFoundError", f"the page has no file {name!r}")
        headers = HEADERS | {"Cache-Control": "no-cache", "ETag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.kind, headers=headers)

    async def session(self, request: Request) -> Response:
        """Whether this browser is logged in; never an error, which browsers would note on their consoles."""
        self._access.require_own(request)
        return self._told(self._access.session(request))

    async def log_in(self, request: Request) -> Response:
        """The admin token against a cookie."""
        self._access.require_own(request, writing=True)
        token = (await parsed(request, Login)).token
        try:
            made = self._access.log_in(request, token)
        except Refused as refused:
            address = request.client.host if request.client is not None else "?"
            logger.warning("a login to the page was refused, from %s: %s", address, refused)
            raise
        answer = self._told(made)
        answer.set_cookie(
            cookie_name(request),
            made,
            max_age=int(LIFETIME),
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return answer

    async def log_out(self, request: Request) -> Response:
        """The session ends."""
        self._access.require_own(request, writing=True)
        self._access.sessions.end(self._access.session(request))
        answer = self._told(None)
        answer.delete_cookie(cookie_name(request), path="/", httponly=True, samesite="strict")
        return answer

    def _told(self, session: str | None) -> JSONResponse:
        left = self._access.sessions.left(session)
        told: dict[str, Any] = {"in": left > 0, "server": self._server, "version": __version__}
        if left:
            told["seconds"] = int(left)
        return JSONResponse(told, headers=HEADERS | {"Cache-Control": "no-store"})


def _packaged() -> Any:
    for file in files(__package__).joinpath("page").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            content = file.read_bytes()
            yield file.name, File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
