"""``thaw lend``: the weights that engines of this host offer, lent to engines of others over TCP."""

from __future__ import annotations

import contextlib
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
thaw lend
thaw lend --listen 10.0.0.5:28429 --token-file /etc/thaw/peer-token
thaw lend --listen [::1]:28429 --takers 2
"""


def lend(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 is any that is free.")
    ] = "127.0.0.1:28429",
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="The token that both ends prove to know. [default: $THAW_PEER_TOKEN_FILE, else one that is made once]",
        ),
    ] = None,
    takers: Annotated[int, typer.Option("--takers", min=1, max=64, help="Ranks that may take weights at a time.")] = 8,
) -> None:
    """Lend what engines here offer to engines elsewhere, over TCP.

    The engines here are those of --offer-weights, of this user. An engine elsewhere takes its weights by
    --peer tcp://HOST:PORT, with the same token in a file that THAW_PEER_TOKEN_FILE names there.

    Nothing is encrypted: whoever is on the way between the two can read the weights, and nobody there can alter them.
    Use a private network, WireGuard or an SSH tunnel where that is not enough. It runs until Ctrl-C.
    """
    from ..transport.peer_token import lender_token
    from ..transport.tcp_address import SCHEME, listening_address
    from ..transport.tcp_lender import Lender

    address = listening_address(listen)
    token, file = lender_token(token_file, os.environ)

    def say(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone ends no loan
            print(f"thaw: {line}", file=sys.stderr, flush=True)

    with contextlib.closing(Lender(address, token, takers=takers, say=say)) as lender:
        if not ip_address(lender.address.host.partition("%")[0]).is_loopback:
            say("nothing is encrypted: whoever is on the way can read the weights")
        print(f"lends at {SCHEME}{lender.address}; the token is in {str(file)!r}", flush=True)
        lender.serve()
