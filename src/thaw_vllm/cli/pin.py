"""``thaw pin``: sessions that are kept, whatever room they take."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Json, document
from .sessions import SHOWN, SessionArgument, StoreOption, opened

EXAMPLES = """
thaw pin trunk
thaw pin trunk --off
"""


def pin(
    session: SessionArgument,
    off: Annotated[bool, typer.Option("--off", help="Let it go with the others again.")] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Keep a session when thaw gc makes room.

    Also one that expires, for as long as it is pinned.
    """
    place = opened(store)
    with place.use():
        id_ = place.find(session)
        place.pin(id_, not off)
    if as_json:
        document({"id": id_, "pinned": not off})
        return
    print(f"{id_[:SHOWN]} {'may go' if off else 'is kept'}")
