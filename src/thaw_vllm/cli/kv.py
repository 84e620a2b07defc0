"""``thaw kv``: freeze and restore what a running server has cached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import examples, plain_app
from .output import Force, Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, Evict, ModelId, Server, Token, ask

EXAMPLES = """
thaw kv freeze manual.thawkv --prompt-file manual.txt
thaw kv freeze chat.thawkv --request cmpl-4f1c --server http://127.0.0.1:8001
thaw kv freeze all.thawkv --everything --force
thaw kv restore manual.thawkv
thaw kv info --json | jq .known
"""

Name = Annotated[str, typer.Argument(metavar="NAME", help="A .thawkv file in the server's THAW_KV_DIR.")]

app = plain_app(add_completion=False)


@app.callback(epilog=examples(EXAMPLES))
def kv() -> None:
    """Freeze and restore what a running server has cached.

    vllm serve answers where VLLM_PLUGINS, THAW_ADMIN_TOKEN and THAW_KV_DIR are set; thaw doctor prints the line.
    """


@app.command(epilog=examples(EXAMPLES, "freeze"))
def freeze(
    name: Name,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Freeze what begins this; repeat.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Likewise, a text file as it is; repeat.")
    ] = None,
    token_ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Likewise, JSON: a list of token ids, or several lists.")
    ] = None,
    request: Annotated[str | None, typer.Option(metavar="ID", help="Freeze what this running request has.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Freeze what all users have asked.")] = False,
    cache_salt: Annotated[str | None, typer.Option(help="Of the requests with these prompts or token ids.")] = None,
    model_id: ModelId = None,
    force: Force = False,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Write cached prefixes of a server to a file.

    With several ranks the server does not generate meanwhile. The file holds the prompts in the clear.
    """
    from ..errors import UsageError
    from .prompts import lists_of, text_of

    body: dict[str, Any] = {"name": name, "force": force, "everything": everything}
    texts = [*(prompt or ()), *(text_of(path) for path in prompt_file or ())]
    given = {
        "prompts": texts or None,
        "token_ids": None if token_ids is None else lists_of(token_ids),
        "request": request,
        "cache_salt": cache_salt,
        "model_id": model_id,
    }
    body |= {field: value for field, value in given.items() if value is not None}
    selections = {"--prompt or --prompt-file": texts, "--token-ids": token_ids, "--request": request}
    chosen = [option for option, value in (selections | {"--everything": everything}).items() if value]
    if len(chosen) != 1:
        told = f"{' and '.join(chosen)} do not go together" if chosen else "nothing is named to freeze"
        raise UsageError(f"{told}; give one of --prompt, --prompt-file, --token-ids, --request and --everything")
    answer = ask(server, "kv/freeze", token, api_key, body)
    if as_json:
        document(answer)
        return
    kept = answer.get("kept")  # not told by servers of earlier versions
    skipped = [("left out", f"{count} blocks {why}") for why, count in answer["skipped"].items()]
    pairs(
        [
            ("file", plain(str(answer["name"]))),
            ("prefixes", f"{answer['prefixes']}, the longest of {answer['tokens']} tokens"),
            ("blocks", str(answer["blocks"])),
            ("size", size(answer["bytes"])),
            *([("held alike", f"{size(answer['kept'])} of it, by several ranks, and stored once")] if kept else []),
            ("seconds", f"{answer['seconds']:.2f}"),
            *((what, plain(text)) for what, text in skipped),
        ]
    )


@app.command(epilog=examples(EXAMPLES, "restore"))
def restore(
    name: Name,
    evict: Evict = False,
    model_id: ModelId = None,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Bring a file's blocks into a server's cache.

    The next request with such a prefix skips its prefill.
    """
    body: dict[str, Any] = {"name": name, "evict": evict} | ({} if model_id is None else {"model_id": model_id})
    answer = ask(server, "kv/restore", token, api_key, body)
    if as_json:
        document(answer)
        return
    pairs(
        [
            ("file", plain(str(answer["name"]))),
            ("thawed", f"{answer['blocks']} blocks, {size(answer['bytes'])}"),
            ("cached before", f"{answer['present']} blocks"),
            ("left out", f"{answer['left_out']} blocks for want of room"),
            ("prefixes", f"{answer['prefixes']}, the longest in the cache of {answer['tokens']} tokens"),
            ("seconds", f"{answer['seconds']:.2f}"),
        ]
    )


@app.command(epilog=examples(EXAMPLES, "info"))
def info(server: Server = LOCAL, token: Token = None, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Say what a server has cached."""
    answer = ask(server, "kv/info", token, api_key, None)
    if as_json:
        document(answer)
        return
    pairs(
        [
            ("blocks", f"{answer['blocks']} of {answer['block_size']} tokens"),
            ("free", str(answer["free"])),
            ("cached", f"{answer['cached']}, of {answer['known']} the tokens are known"),
            ("model", plain(str(answer["model"] or "unknown; pass --model-id"))),
        ]
    )
