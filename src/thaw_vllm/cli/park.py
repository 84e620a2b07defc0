"""``thaw park``: a running server gives its GPU back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import Force, Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, Deadline, Server, Token, ask

EXAMPLES = """
thaw park
thaw park --kv before.thawkv --deadline 5
thaw park --keep-weights --no-driver --server http://127.0.0.1:8001
"""


def park(
    kv: Annotated[
        str | None, typer.Option(metavar="NAME", help="Freeze what is cached first: a .thawkv file in THAW_KV_DIR.")
    ] = None,
    force: Force = False,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="In host memory, rather than to read their snapshot again.")
    ] = False,
    driver: Annotated[
        bool | None,
        typer.Option("--driver/--no-driver", help="NVIDIA's driver must or must not help. [default: if it may]"),
    ] = None,
    deadline: Deadline = 30.0,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Have a running server give its GPU back.

    thaw wake brings it back. Its processes live on, with their CUDA graphs and compiled code. The server must have been
    started from a snapshot with --enable-sleep-mode. Requests wait meanwhile, and are ended when it wakes.
    """
    body: dict[str, Any] = {"force": force, "keep_weights": keep_weights, "driver": driver, "deadline": deadline}
    answer = ask(server, "engine/park", token, api_key, body | ({} if kv is None else {"kv": kv}))
    if as_json:
        document(answer)
        return
    took = "nothing of it" if answer["driver"] else f"up to {size(answer['left'])}: {answer['why']}"
    pairs(
        [
            ("stays on the GPU", plain(took)),
            ("weights", "in host memory" if answer["contents"] is None else "in their snapshot"),
            ("KV blocks", plain(str(answer["kv"] or "dropped"))),
            ("requests ended", str(answer["aborted"])),
            ("seconds", f"{answer['seconds']['total']:.2f}"),
        ]
    )
