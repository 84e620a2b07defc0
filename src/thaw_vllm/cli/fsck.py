"""``thaw fsck``: a store of sessions held against its checksums."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from .output import Json, document, pairs, plain, size
from .progress import progress
from .sessions import SHOWN, StoreOption, opened

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
    from ..errors import CorruptionError
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
        rows += [("damaged in", id_[:SHOWN]) for id_ in found.hurt]
        rows += [("missing in", f"{id_[:SHOWN]}: {count} blocks") for id_, count in found.missing.items()]
        rows += [("repaired", plain(path)) for path in found.repaired]
        rows += [("strange", plain(path)) for path in found.strange]
        if found.unneeded or found.unfinished:
            unneeded = f"{found.unneeded} blocks, {found.unfinished} unfinished files"
            rows.append(("unneeded", f"{unneeded}; thaw gc removes them"))
        pairs([*rows, ("sound", "yes" if found.sound else "no")])
    sys.stdout.flush()
    if not found.sound:
        cure = "what could be was repaired" if repair else "thaw fsck --repair takes out what is damaged"
        raise CorruptionError(f"{str(place.directory)!r} is not sound; {cure}")
