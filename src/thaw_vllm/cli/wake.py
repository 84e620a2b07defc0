"""``thaw wake``: a parked server takes its GPU again."""

from __future__ import annotations

from .output import Json, document, pairs, plain, size
from .server import LOCAL, ApiKey, Server, Token, Verify, ask

EXAMPLES = """
thaw wake
thaw wake --server http://127.0.0.1:8001 --json
"""


def wake(
    verify: Verify = True,
    server: Server = LOCAL,
    token: Token = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Bring a parked server back.

    Its memory, its weights, and what was cached, where that was kept. A canary prompt is asked before requests are let
    in.
    """
    answer = ask(server, "engine/wake", token, api_key, {"verify": verify})
    if as_json:
        document(answer)
        return
    pairs(
        [
            ("weights", size(answer["bytes"]) if answer["bytes"] else "from host memory"),
            ("KV blocks", plain(answer["lost"] and f"lost: {answer['lost']}") or str(answer["blocks"])),
            ("requests ended", str(answer["aborted"])),
            ("seconds", f"{answer['seconds']['total']:.2f}"),
        ]
    )
