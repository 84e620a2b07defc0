"""``thaw gc``: room made in a store of sessions."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .output import Json, document, pairs, plain, size
from .sessions import SHOWN, StoreOption, opened

EXAMPLES = """
thaw gc
thaw gc --budget-gb 50 --dry-run
"""


def gc(
    budget_gb: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Remove sessions, too, until blocks take at most so much. [default: $THAW_SESSIONS_GB, else none]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and leave it.")] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Remove expired sessions, and the blocks that none needs.

    With a budget the sessions used longest ago go, too; pinned ones stay. Waits for whoever uses the store.
    """
    from ..sessions.collect import collect, limit

    place = opened(store)
    labels = {one.id: ", ".join(one.head.labels) for one in place.listed()[0]}
    found = collect(place, limit(budget_gb), dry_run=dry_run)
    if as_json:
        document(dataclasses.asdict(found) | {"dry_run": dry_run})
        return
    would = "would be removed" if dry_run else "removed"
    rows = [(would, f"{len(found.sessions)} sessions; {found.blocks} blocks, {size(found.freed)}")]
    for id_ in found.sessions:
        what = "expired" if id_ in found.expired else "session"
        rows.append((what, f"{id_[:SHOWN]}  {plain(labels.get(id_, ''))}".rstrip()))
    rows.append(("left", size(found.left)))
    if found.over:
        rows.append(("too much", f"{size(found.over)}, which pinned sessions hold"))
    pairs(rows)
