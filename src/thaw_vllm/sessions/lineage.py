"""Sessions as a forest: which continues or branches off which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..format.document import JSONObject
from .store import Listed


@dataclass(frozen=True)
class Node:
    """A place in the forest.

    Attributes:
        one: the session.
        depth: sessions before it.
        last: for each fork on the way to it, the first one first, whether it is of the last branch there. Where a
            session has only one child there is no fork.
        forks: its parent has other children, so that the last entry is of its own branch.
        orphan: its parent is gone.
    """

    one: Listed
    depth: int
    last: tuple[bool, ...]
    forks: bool
    orphan: bool

    def shown(self) -> JSONObject:
        """The session as ``Head.shown`` has it, and its place."""
        one = self.one
        return one.head.shown(one.id) | {"used": one.used, "pinned": one.pinned, "depth": self.depth}

    @property
    def lines(self) -> str:
        """What a tree of text has before it: a star for a first session, an arrow for an only child, else lines."""
        if not self.depth:
            return "* "
        return "  " + drawn(self.last, self.forks) + ("" if self.forks else "↳ ")


def drawn(last: Sequence[bool], forks: bool = True) -> str:
    """The lines before a place in a tree of text.

    Args:
        last: for each fork on the way to it, the first one first, whether it is of the last branch there.
        forks: the last of them is where it branches off itself.
    """
    shown = ["   " if one else "│  " for one in last]
    if forks:
        shown[-1] = "└─ " if last[-1] else "├─ "
    return "".join(shown)


def forest(listed: Sequence[Listed], about: str | None = None) -> Iterator[Node]:
    """Every session after its parent, the oldest first.

    Args:
        about: only that session's ancestors, itself, and what descends from it.
    """
    known = {one.id: one for one in listed}
    chosen = set(known) if about is None else _related(known, about)
    children: dict[str | None, list[Listed]] = {}
    for one in sorted((known[id_] for id_ in chosen), key=lambda one: (one.head.created, one.id)):
        parent = one.head.parent
        children.setdefault(parent if parent in chosen else None, []).append(one)
    # No recursion: a session may have been continued a thousand times. Ids are digests, so no session is its own
    # ancestor.
    stack = [Node(one, 0, (), False, one.head.parent is not None) for one in reversed(children.get(None, []))]
    while stack:
        node = stack.pop()
        yield node
        below = children.get(node.one.id, [])
        for child in reversed(below):
            last = (*node.last, child is below[-1]) if len(below) > 1 else node.last
            stack.append(Node(child, node.depth + 1, last, len(below) > 1, False))


def _related(known: dict[str, Listed], about: str) -> set[str]:
    found = {about}
    at = known[about].head.parent
    while at in known and at not in found:
        found.add(at)
        at = known[at].head.parent
    children: dict[str | None, list[str]] = {}
    for one in known.values():
        children.setdefault(one.head.parent, []).append(one.id)
    below = [about]
    while below:
        below += children.get(at := below.pop(), [])
        found.add(at)
    return found
