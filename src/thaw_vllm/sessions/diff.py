"""Two sessions compared: where their tokens part, and which blocks they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..format.document import JSONObject
from .record import Head, Session
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

    @property
    def first(self) -> int | None:
        """The first token that differs, counted from 0; None: they are the same."""
        return self.common if self.common < max(self.tokens) else None

    def shown(self, a: str, b: str) -> JSONObject:
        """As plain values, for the sessions of these ids."""
        return {"a": a, "b": b, "first_difference": self.first} | asdict(self)


def common_tokens(a: Session, b: Session) -> int:
    """How many tokens two sessions begin with alike."""
    return common_prefix(a.tokens, b.tokens)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many entries two sequences of one type begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is quick; Python's loop over a million tokens is not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def alike(a: Head, b: Head) -> bool:
    """Whether blocks of the same tokens are the same blocks in both."""
    return a.contexts == b.contexts and a.salt == b.salt


def shared_blocks(a: Head, b: Head, common: int) -> int:
    """Files of blocks, for each rank, that both sessions name.

    Args:
        common: how many tokens they begin with alike.
    """
    if not alike(a, b):
        return 0
    end = min(common // a.block_size, a.blocks, b.blocks)  # addresses are equal as far as the tokens are
    # Whether each record has the groups of its contexts is for whoever reads these to say.
    return sum(max(0, end - max(firsts)) for firsts in zip(a.kept, b.kept, strict=False))


def difference(store: Store, a: Session, b: Session) -> Difference:
    """Compare two sessions of a store; no block is read.

    Raises:
        StorageError, FormatError, CorruptionError: the contexts of one cannot be read.
    """
    heads, common = (a.head, b.head), common_tokens(a, b)
    pages = [sum(context.page for context in store.contexts(head)) for head in heads]
    comparable = alike(*heads)
    shared = shared_blocks(*heads, common)
    own = [head.files - shared for head in heads]
    ranks = [len(head.contexts) for head in heads]
    names = ("model", "salt", "sampling", "prompt")
    other = [name for name in names if len({repr(getattr(head, name)) for head in heads}) > 1]
    return Difference(
        common,
        (a.head.count, b.head.count),
        comparable,
        shared * ranks[0],
        shared * pages[0],
        (own[0] * ranks[0], own[1] * ranks[1]),
        (own[0] * pages[0], own[1] * pages[1]),
        tuple(other),
    )


def size(store: Store, session: Session) -> tuple[int, int]:
    """Files and bytes of a session's blocks, shared or not.

    Raises:
        StorageError, FormatError, CorruptionError: its contexts cannot be read.
    """
    count, contexts = session.head.files, store.contexts(session.head)
    return count * len(contexts), count * sum(context.page for context in contexts)
