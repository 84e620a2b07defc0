"""Who may use the routes of a pool's own: whoever has the admin token, and browsers that have logged in with it."""

from __future__ import annotations

import hmac
import ipaddress
import math
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from fastapi import Request, Response

from ..engines.vllm.kv.access import TOKEN_HEADER
from .router import Refused
from .sessions import Attempts, Sessions

HOSTS = ("localhost",)
"""What callers may call this server, beside its addresses: another name that leads here is an attack on a browser (DNS
rebinding)."""
READING = ("GET", "HEAD")


class Access:
    """Decides for each request.

    Attributes:
        sessions: browsers that are logged in.
    """

    def __init__(self, token: str, hosts: Collection[str] = (), sessions: Sessions | None = None) -> None:
        self.sessions = sessions or Sessions()
        self._token, self._hosts = token.encode(), {host.lower() for host in (*HOSTS, *hosts)}
        self._attempts = Attempts()

    async def require(self, request: Request) -> None:
        """Raises:
        Refused: this caller has not sent the admin token, or is another site's page.
        """
        self.require_own(request)
        if not self._is_token(request.headers.get(TOKEN_HEADER, "")):
            raise Refused(403, "Forbidden", f"send the admin token in the header {TOKEN_HEADER}")

    async def require_or_session(self, request: Request, response: Response) -> None:
        """For what the page asks, too.

        Raises:
            Refused: this caller has neither the admin token nor a session, or is another site's page.
        """
        response.headers["Cache-Control"] = "no-store"
        if self.session(request) is None or TOKEN_HEADER in request.headers:
            return await self.require(request)
        self.require_own(request, writing=request.method not in READING)

    def require_host(self, request: Request) -> None:
        """Raises:
        Refused: the server is called by a name that is not its own.
        """
        called = request.headers.get("host", "")
        name = _split(called).hostname or ""
        if name not in self._hosts and not _is_address(name):
            raise Refused(403, "Forbidden", f"this server is not called {called!r}; see --allowed-host")

    def require_own(self, request: Request, *, writing: bool = False) -> None:
        """
        Args:
            writing: a browser acts by its cookie, or logs in: it has to say from where.

        Raises:
            Refused: the server is called by a name that is not its own, or by another site's page.
        """
        self.require_host(request)
        called, origin = request.headers.get("host", ""), request.headers.get("origin")
        foreign = origin != f"{request.url.scheme}://{called}" if origin is not None else writing
        if foreign or request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(403, "Forbidden", "other sites may not ask this server")

    def session(self, request: Request) -> str | None:
        """The secret of the session that a request belongs to."""
        given = request.cookies.get(cookie_name(request))
        return given if self.sessions.left(given) else None

    def log_in(self, request: Request, token: str) -> str:
        """A new session's secret, for whoever knows the admin token.

        Raises:
            Refused: it is another one, or there were too many of those.
        """
        address = request.client.host if request.client is not None else ""
        wait = self._attempts.wait(address)
        if wait:
            raise Refused(
                429, "TooManyRequests", f"too many logins have failed; try again in {math.ceil(wait)} s", wait
            )
        if not self._is_token(token):
            self._attempts.note(address)
            raise Refused(403, "Forbidden", "this is not the admin token; the server says at its start where it is")
        self.sessions.end(self.session(request))
        return self.sessions.begin()

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token)


def cookie_name(request: Request) -> str:
    """With the port in it: browsers keep one jar for all servers of a host."""
    try:
        port = _split(request.headers.get("host", "")).port
    except ValueError:
        port = None
    return "thaw_session" if port is None else f"thaw_session_{port}"


def _split(host: str) -> SplitResult:
    try:
        return urlsplit(f"//{host}")
    except ValueError:
        return urlsplit("//")


def _is_address(name: str) -> bool:
    """An address is no name that somebody else could have lead here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
