"""Asking a running server's routes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .output import plain

LONGEST_WAIT = 7200
"""Seconds: freezing waits for a disk, swapping and parking for requests, and the server answers when it is done."""

Server = Annotated[str, typer.Option(metavar="URL", help="Where vllm serve listens.")]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="THAW_ADMIN_TOKEN",
        show_envvar=False,
        help="The server's. [default: $THAW_ADMIN_TOKEN; on this machine, the one that thaw serve keeps]",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="VLLM_API_KEY", show_envvar=False, help="vLLM's own, if any. [default: $VLLM_API_KEY]"
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Hold every chunk of the snapshot against its checksum.")
]
Deadline = Annotated[float, typer.Option(min=0, max=3600, help="Seconds in which running requests may end.")]
ModelId = Annotated[
    str | None, typer.Option("--model-id", help="Which weights the server holds (thaw id), where it does not know.")
]
Evict = Annotated[bool, typer.Option("--evict", help="Let cached blocks that nobody uses make room.")]
LOCAL = "http://127.0.0.1:8000"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Where the kept admin token may be sent to."""


def ask(server: str, what: str, token: str | None, api_key: str | None, body: dict[str, Any] | None) -> dict[str, Any]:
    """One request to a route of thaw's, a GET where there is no body.

    Args:
        what: the route behind ``/v1/thaw/``.

    Raises:
        ThawError: the one that the server tells of, or why there is no answer.
    """
    import http.client
    from urllib.parse import urlsplit

    from ..engines.vllm.kv.access import TOKEN_HEADER, TOKEN_VARIABLE
    from ..errors import ThawError, UsageError
    from ..serve.admin_token import kept_token

    try:
        url = urlsplit(server)
        host, port = url.hostname or "", url.port
    except ValueError:
        host = ""
    if not host or url.scheme not in ("http", "https") or url.query or url.fragment:
        raise UsageError(f"--server {server!r} is no address; it is like {LOCAL}")
    token = token or (kept_token() if host in LOOPBACK else None)
    if not token:
        raise UsageError(
            f"set {TOKEN_VARIABLE}, or give --token: what the server was started with (thaw serve keeps it in "
            "~/.local/state/thaw/admin-token)"
        )
    headers = {"Content-Type": "application/json", TOKEN_HEADER: token}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise UsageError("the token and the API key must be printable ASCII")
    # Not urllib.request: it follows redirects and proxies of the environment, and the token would go along.
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=LONGEST_WAIT)
    try:
        path = f"{url.path.rstrip('/')}/v1/thaw/{what}"
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        status, raw = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ThawError(
            f"the server at {server} does not answer: {why}; is thaw serve (or vllm serve) running there?"
        ) from None
    finally:
        connection.close()
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        answer = None
    if status == 200 and isinstance(answer, dict):
        return answer
    raise _told(server, status, answer)


def _told(server: str, status: int, answer: Any) -> Exception:
    """The error that an answer tells of."""
    from .. import errors
    from ..engines.vllm.kv.access import TOKEN_HEADER

    found = answer.get("error") if isinstance(answer, dict) else None
    kind, message = (found.get("type"), str(found.get("message"))) if isinstance(found, dict) else (None, "")
    ours = errors.named(kind)
    if ours is not None:
        return ours(plain(message))
    if kind == "Forbidden":
        if TOKEN_HEADER in message:
            message = f"THAW_ADMIN_TOKEN or --token is not its admin token ({message})"
        return errors.UsageError(f"the server at {server} refused: {plain(message)}")
    if status == 401:
        return errors.UsageError(f"the server at {server} wants vLLM's API key; set VLLM_API_KEY, or give --api-key")
    if status in (404, 405):
        if kind == "NotFoundError" and "/v1/thaw/" in message:
            return errors.UsageError(f"the server at {server} is no single model's: {plain(message)}")
        return errors.UsageError(
            f"the server at {server} has no routes of thaw's; start it with thaw serve, or with the environment that "
            "'thaw doctor' prints"
        )
    why = plain(message) or "nothing that says why; is it vLLM's, with thaw's routes?"
    return errors.ThawError(f"the server at {server} answered {status}: {why}")
