"""``thaw swap``: another snapshot's weights into a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, Deadline, Server, Token, Verify, ask

EXAMPLES = """
thaw swap fine-tune.thaw
thaw swap fine-tune.thaw --deadline 0 --server http://127.0.0.1:8001
"""


def swap(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A .thaw file in the server's THAW_SNAPSHOT_DIR.")],
    verify: Verify = True,
    deadline: Deadline = 30.0,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Put another snapshot's weights into a running server.

    Refused with the reason unless nothing but the weights differs. Requests that are left at the deadline are ended,
    caches are emptied, and a canary prompt is asked before requests are let in. The model's name stays.
    """
    answer = ask(server, "engine/swap", token, api_key, {"name": name, "verify": verify, "deadline": deadline})
    if as_json:
        document(answer)
        return
    pairs(
        [
            ("weights", size(answer["bytes"])),
            ("model", plain(str(answer["model"] or "not said"))),
            ("requests ended", str(answer["aborted"])),
            ("seconds", f"{answer['seconds']['total']:.2f}"),
        ]
    )
