"""``thaw export``: a session as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Force, Json, document, pairs, plain, size
from .progress import progress
from .sessions import SessionArgument, StoreOption, opened

EXAMPLES = """
thaw export trunk trunk.thawsession
"""


def export(
    session: SessionArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write, by custom a .thawsession.")],
    force: Force = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Write a session to one file.

    It holds all tokens, and all blocks that are kept of it. Whoever has the file can read the conversation; its mode
    is 0600.
    """
    from ..sessions.archive import export as write

    with progress("export") as advance:
        id_, length = write(opened(store), session, file, force=force, progress=advance)
    if as_json:
        document({"id": id_, "file": str(file), "bytes": length})
        return
    pairs([("session", id_), ("file", plain(str(file))), ("size", size(length))])
