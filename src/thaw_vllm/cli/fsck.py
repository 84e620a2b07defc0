"""``thaw fsck``: a store of sessions held against its checksums."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, document, pairs, plain, size
from .progress import progress
from .sessions import SHOWN, StoreOption, opened

if TYPE_CHECKING:
    from ..sessions.fsck import Checked

EXAMPLES = """
thaw fsck
thaw fsck --quick
thaw fsck --repair
"""


def fsck(
    quick: Annotated[bool, typer.Option("--quick", help="Look at heads and sizes of blocks alone.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged blocks; move records that cannot be read to lost/.")
    ] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Check every session and every block of a store.

    The exit code is 3 when something is damaged or missing, also after a repair. A session that lacks a block goes on
    from the one before it, and computes the rest again.
    """
    from ..errors import CorruptionError, StorageError
    from ..sessions.fsck import fsck as check

    place = opened(store)
    with progress("fsck") as advance:
        found = check(place, quick=quick, repair=repair, progress=advance)
    if as_json:
        document(dataclasses.asdict(found) | {"sound": found.sound, "store": str(place.directory)})
    else:
        looked = f"{found.blocks} blocks, {size(found.bytes)}" + (" (heads only)" if quick else "")
        rows = [("sessions", str(found.sessions)), ("looked at", looked)]
        rows += [("broken", f"{id_[:SHOWN]}: {plain(why)}") for id_, why in found.broken.items()]
        rows += [("damaged", plain(why)) for why in found.damaged.values()]
        rows += [("not read", plain(why)) for why in found.unread.values()]
        rows += [("lacks blocks", f"{id_[:SHOWN]}: goes on with {left} tokens") for id_, left in found.missing.items()]
        rows += [("repaired", plain(path)) for path in found.repaired]
        rows += [("strange", plain(path)) for path in found.strange]
        if found.unneeded or found.unfinished:
            unneeded = f"{found.unneeded} blocks, {found.unfinished} unfinished files"
            rows.append(("unneeded", f"{unneeded}; thaw gc removes them"))
        pairs([*rows, ("sound", "yes" if found.sound else "no")])
    sys.stdout.flush()
    shown = repr(str(place.directory))
    if found.unread and not (found.damaged or found.missing or found.broken.keys() - found.unread.keys()):
        raise StorageError(
            f"{len(found.unread)} files in {shown} could not be read; mend their permissions, or the disk"
        )
    if not found.sound:
        raise CorruptionError(f"{shown} is not sound; {_cure(found, repair)}")


def _cure(found: Checked, repair: bool) -> str:
    if (found.damaged or found.broken) and not repair:
        return "thaw fsck --repair takes out what is damaged"
    if found.missing:
        return (
            "sessions that lack blocks go on with fewer tokens; a checkpoint of the same tokens, or thaw import, "
            "brings them back, and thaw branch --at makes one that is whole"
        )
    return "what could be was repaired; thaw rm forgets sessions that cannot be read"
