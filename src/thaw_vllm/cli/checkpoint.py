"""``thaw checkpoint``: a session of what a running server has computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, ModelId, Server, Token, ask
from .sessions import Labels, Ttl, expiry_row, ttl_seconds

EXAMPLES = """
thaw checkpoint --request cmpl-4f1c --label plan-a
thaw checkpoint --token-ids chat.json --parent trunk --ttl 7d
thaw checkpoint --prompt-file manual.txt --label manual --server http://127.0.0.1:8001
"""


def checkpoint(
    request: Annotated[str | None, typer.Option(metavar="ID", help="What this running request has come to.")] = None,
    token_ids: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON: a list of token ids.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="A text, as for /v1/completions.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Likewise, a text file as it is.")] = None,
    label: Labels = None,
    ttl: Ttl = None,
    parent: Annotated[
        str | None, typer.Option(metavar="SESSION", help="What it went on from: an id, its beginning, or a label.")
    ] = None,
    cache_salt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the request with this prompt or these token ids.")
    ] = None,
    model_id: ModelId = None,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Keep a session of a running server.

    Its tokens, and the keys and values of those blocks that the server has cached, in the server's own store
    (THAW_SESSIONS_DIR, thaw serve --sessions-dir). The server generates nothing meanwhile. The store holds the
    conversation in the clear.
    """
    from ..errors import UsageError
    from .prompts import lists_of, text_of

    sources = {"--request": request, "--token-ids": token_ids, "--prompt": prompt, "--prompt-file": prompt_file}
    chosen = [option for option, value in sources.items() if value is not None]
    if len(chosen) != 1:
        told = f"{' and '.join(chosen)} do not go together" if chosen else "nothing is named to keep"
        raise UsageError(f"{told}; give one of {', '.join(sources)}")
    given: dict[str, Any] = {
        "request": request,
        "prompt": prompt if prompt_file is None else text_of(prompt_file),
        "labels": label or None,
        "ttl": ttl_seconds(ttl),
        "parent": parent,
        "cache_salt": cache_salt,
        "model_id": model_id,
    }
    if token_ids is not None:
        found = lists_of(token_ids)
        if len(found) != 1:
            raise UsageError(f"{str(token_ids)!r} holds {len(found)} lists of token ids; a session has one")
        given["token_ids"] = found[0]
    body = {field: value for field, value in given.items() if value is not None}
    answer = ask(server, "sessions/checkpoint", token, api_key, body)
    if as_json:
        document(answer)
        return
    pairs(
        [
            ("session", plain(str(answer["session"]))),
            ("tokens", str(answer["tokens"])),
            ("kept", f"{answer['blocks']} blocks"),
            ("added", f"{answer['added']} files of blocks, {size(answer['bytes'])}"),
            ("seconds", f"{answer['seconds']:.2f}"),
            *expiry_row(answer.get("expires")),
        ]
    )
