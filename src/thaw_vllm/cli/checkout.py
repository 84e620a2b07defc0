"""``thaw checkout``: a session's blocks into a running server's cache."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, Evict, ModelId, Server, Token, ask
from .sessions import SessionArgument

EXAMPLES = """
thaw checkout trunk
thaw checkout 3f2a91c0 --evict --server http://127.0.0.1:8001
thaw checkout trunk --show-tokens --json | jq .token_ids
"""


def checkout(
    session: SessionArgument,
    evict: Evict = False,
    show_tokens: Annotated[
        bool, typer.Option("--show-tokens", help="With its token ids: the prompt for /v1/completions.")
    ] = False,
    model_id: ModelId = None,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Bring a session back into a running server.

    Its blocks go into the server's cache, out of the server's own store (THAW_SESSIONS_DIR, thaw serve --sessions-dir).
    The next request that begins with its tokens skips their prefill.
    """
    body: dict[str, Any] = {"session": session, "evict": evict, "token_ids": show_tokens}
    body |= {} if model_id is None else {"model_id": model_id}
    answer = ask(server, "sessions/checkout", token, api_key, body)
    if as_json:
        document(answer)
        return
    rows = [
        ("session", plain(str(answer["session"]))),
        ("thawed", f"{answer['blocks']} blocks, {size(answer['bytes'])}"),
        ("cached before", f"{answer['present']} blocks"),
        ("left out", f"{answer['left_out']} blocks for want of room"),
        ("lost", f"{answer['lost']} blocks that the store lacks"),
        ("cached", f"{answer['cached']} of {answer['tokens']} tokens"),
        ("seconds", f"{answer['seconds']:.2f}"),
    ]
    if show_tokens:
        rows.append(("salted", "yes: send the cache_salt that its request had" if answer["salted"] else "no"))
        rows.append(("generated", f"{answer['generated']} of its tokens"))
        rows.append(("token ids", plain(" ".join(map(str, answer["token_ids"])))))
    pairs(rows)
