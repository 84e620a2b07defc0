"""Two sessions compared: where their tokens part, and which blocks they share."""

from __future__ import annotations

from dataclasses import dataclass

from .record import Session
from .store import Store


@dataclass(frozen=True)
class Difference:
    """Of two sessions.

    Attributes:
        common: tokens that they begin with alike; the next one is the first that differs.
        tokens: of each in all.
        comparable: their blocks were made alike, and are shared as far as the tokens are.
        shared_blocks, shared_bytes: files of blocks that both name.
        own_blocks, own_bytes: that only the first names, only the second.
        other: names of what else differs: sampling, salt, model, prompt.
    """

    common: int
    tokens: tuple[int, int]
    comparable: bool
    shared_blocks: int
    shared_bytes: int
    own_blocks: tuple[int, int]
    own_bytes: tuple[int, int]
    other: tuple[str, ...]


def common_tokens(a: Session, b: Session) -> int:
    """How many tokens two sessions begin with alike."""
    low, high = 0, min(a.head.count, b.head.count)
    while low < high:  # comparing slices is quick; Python's loop over a million tokens is not
        middle = (low + high + 1) // 2
        if a.tokens[low:middle] == b.tokens[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def difference(store: Store, a: Session, b: Session) -> Difference:
    """Compare two sessions of a store; no block is read.

    Raises:
        StorageError, FormatError, CorruptionError: the contexts of one cannot be read.
    """
    sizes: list[dict[object, int]] = []
    for one in (a, b):
        sizes.append({(name.address, name.group): context.page for context, name in store.names(one)})
    both = sizes[0].keys() & sizes[1].keys()
    own = [[size for name, size in found.items() if name not in both] for found in sizes]
    heads = (a.head, b.head)
    other = [
        name for name in ("model", "salt", "sampling", "prompt") if len({repr(getattr(h, name)) for h in heads}) > 1
    ]
    return Difference(
        common_tokens(a, b),
        (a.head.count, b.head.count),
        a.head.contexts == b.head.contexts and a.head.salt == b.head.salt,
        len(both),
        sum(sizes[0][name] for name in both),
        (len(own[0]), len(own[1])),
        (sum(own[0]), sum(own[1])),
        tuple(other),
    )


def size(store: Store, session: Session) -> tuple[int, int]:
    """Files and bytes of a session's blocks, shared or not.

    Raises:
        StorageError, FormatError, CorruptionError: its contexts cannot be read.
    """
    head, contexts = session.head, store.contexts(session.head)
    count = sum(head.blocks - first for first in head.kept)
    return count * len(contexts), count * sum(context.page for context in contexts)
