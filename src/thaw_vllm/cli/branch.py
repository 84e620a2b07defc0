"""``thaw branch``: a session from the first tokens of another."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Json, document, pairs
from .sessions import Labels, SessionArgument, StoreOption, Ttl, expiry_row, opened, ttl_seconds

EXAMPLES = """
thaw branch trunk --label plan-a
thaw branch 3f2a91c0 --at 1024 --label "before the mistake"
thaw branch 3f2a91c0 --at -20 --ttl 12h
"""


def branch(
    session: SessionArgument,
    at: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that it has; below 0 from the end. [default: all]")
    ] = None,
    label: Labels = None,
    ttl: Ttl = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Make a session from the first tokens of another.

    No engine is needed. It shares the blocks of that one. Rewinding is the same with an earlier token. That the other
    one expires does not matter to it.
    """
    from ..sessions.branch import grow

    place = opened(store)
    with place.use():  # nobody collects it before it is told
        id_ = grow(place, session, at, label or (), ttl_seconds(ttl))
        head = place.read(id_).head
    if as_json:
        document(head.shown(id_))
        return
    kept = head.blocks * head.block_size
    rows = [("session", id_), ("tokens", str(head.count)), ("kept", f"{kept} tokens, no further room")]
    pairs(rows + expiry_row(head.expires))
