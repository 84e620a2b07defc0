"""``thaw rm``: sessions forgotten."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Json, document
from .sessions import SHOWN, StoreOption, opened

EXAMPLES = """
thaw rm plan-b
thaw rm 3f2a91c0 9b1e77d2
"""


def rm(
    session: Annotated[list[str], typer.Argument(metavar="SESSION", help="As for thaw show; several are several.")],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Forget sessions. What branches off them stays, with all of its tokens and blocks.

    Blocks that nobody needs any more go with the next thaw gc.
    """
    place = opened(store)
    with place.use():
        found = [*dict.fromkeys(place.find(word) for word in session)]
        place.forget(found)
    if as_json:
        document({"removed": found})
        return
    for id_ in found:
        print(f"{id_[:SHOWN]} is forgotten")
