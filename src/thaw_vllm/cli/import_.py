"""``thaw import``: the session of a file into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, document, pairs, plain
from .progress import progress
from .sessions import StoreOption

EXAMPLES = """
thaw import trunk.thawsession
"""


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What thaw export has written.")],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Add the session of a file to a store.

    The store is made where there is none. Everything in the file is verified first. The session keeps its id; blocks
    that are there already take no further room.
    """
    import tarfile

    from ..errors import FormatError, StorageError
    from ..sessions.archive import bring
    from ..sessions.store import Store

    try:
        sound = tarfile.is_tarfile(file)
    except OSError as error:
        raise StorageError(f"{str(file)!r} cannot be read: {error.strerror or error}") from None
    if not sound:
        raise FormatError(f"{str(file)!r} is no session of thaw's")
    place = Store(store, create=True)
    with progress("import") as advance:
        id_, added = bring(place, file, progress=advance)
    if as_json:
        document({"id": id_, "blocks_added": added, "store": str(place.directory)})
        return
    blocks = f"{added} were not there" if added else "all were there already"
    pairs([("session", id_), ("blocks", blocks), ("store", plain(str(place.directory)))])
