"""``thaw log``: the sessions of a store, as the tree that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, document, plain, table
from .sessions import SHOWN, StoreOption, lifetime, opened, state, when

if TYPE_CHECKING:
    from ..sessions.lineage import Node

EXAMPLES = """
thaw log
thaw log trunk
thaw log --store runs/sessions --json
"""


def log(
    session: Annotated[
        str | None,
        typer.Argument(metavar="SESSION", help="Only it, what it came from, and what came of it."),
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Show the sessions of a store as a tree.

    Each is below the one that it continues: AT is how many tokens they have in common. A star is a first one, an arrow
    the only one below the line before it. KEPT counts the tokens whose blocks the record names; thaw fsck says whether
    they are there. Text is shown by thaw show and thaw diff, when they are asked for it.
    """
    from ..sessions.lineage import forest

    place = opened(store)
    listed, bad = place.listed()
    about = None if session is None else place.find(session)
    if about in bad:
        raise bad[about]
    nodes = [*forest(listed, about)]
    if as_json:
        shown = [node.shown() for node in nodes]
        document({"store": str(place.directory), "sessions": shown, "broken": {k: str(v) for k, v in bad.items()}})
        return
    if not nodes and not bad:
        print(f"no sessions in {plain(str(place.directory))}")
        return
    rows: list[tuple[str, ...]] = [("SESSION", "AT", "TOKENS", "KEPT", "MADE", "STATE", "LABELS")]
    rows += [_row(node) for node in nodes]
    table(rows, right=frozenset({1, 2, 3}))
    for id_, error in bad.items():
        print(f"{id_[:SHOWN]}  cannot be read: {plain(str(error))}")


def _row(node: Node) -> tuple[str, ...]:
    one, head = node.one, node.one.head
    at = "" if head.fork is None else str(head.fork)
    labels = ", ".join(map(plain, head.labels))
    about = [state(head), lifetime(head.expires), "pinned" * one.pinned, "parent gone" * node.orphan]
    kept = str(head.blocks * head.block_size)
    made = when(head.created)
    return (node.lines + one.id[:SHOWN], at, str(head.count), kept, made, ", ".join(filter(None, about)), labels)
