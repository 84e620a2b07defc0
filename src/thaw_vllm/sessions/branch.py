"""A branch: another session with the first tokens of one, and the same blocks. No engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .. import __version__
from ..errors import UsageError
from .record import Session, expiry, new_nonce, now
from .store import Store
from .windows import kept_from, usable

WRITER = f"thaw {__version__}"


def branch(
    store: Store, session: str, at: int | None = None, *, labels: Sequence[str] = (), ttl: float | None = None
) -> str:
    """A new session that begins like another one.

    Rewinding is branching at an earlier token. It shares the blocks of which it has all tokens, and so takes no room
    but its record's.

    Args:
        session: an id, how one begins, or a label.
        at: tokens that it has, at least 1; from the end where that is below 0; None: all.
        labels: names of yours for it.
        ttl: seconds until it expires; None: it does not, whatever holds for the other one.

    Returns:
        Its id.

    Raises:
        UsageError: there is no such session, or no such token; a label or ``ttl`` cannot be right.
        SpaceError, StorageError: nothing was published.
    """
    with store.use():
        return grow(store, session, at, labels, ttl)


def grow(
    store: Store, session: str, at: int | None = None, labels: Sequence[str] = (), ttl: float | None = None
) -> str:
    """``branch`` for whoever holds ``use``.

    Raises:
        As ``branch``.
    """
    id_ = store.find(session)
    made = store.publish(cut(store, store.read(id_), id_, at, labels, ttl))
    store.touch(id_)
    return made


def cut(
    store: Store,
    whole: Session,
    id_: str,
    at: int | None,
    labels: Sequence[str] = (),
    ttl: float | None = None,
) -> Session:
    """The record of a branch, not published.

    Raises:
        UsageError: there is no such token, or ``ttl`` cannot be right.
        StorageError, FormatError, CorruptionError: what its blocks were made with cannot be read.
    """
    head = whole.head
    count = head.count if at is None else at if at >= 0 else head.count + at
    if not 0 < count <= head.count:
        raise UsageError(f"the session {id_[:12]} has {head.count} tokens; a branch may have 1 to as many, not {at}")
    groups, size = store.contexts(head)[0].layout.groups, head.block_size

    def there(number: int, group: int) -> bool:
        return number >= head.kept[group]

    blocks = usable(groups, min(head.blocks, count // size), size, there)
    same, created = count == head.count, now()
    made = replace(
        head,
        count=count,
        prompt=min(head.prompt, count),
        created=created,
        expires=expiry(created, ttl),
        parent=id_,
        fork=count,
        labels=tuple(labels),
        finished=head.finished if same else None,
        random=head.random if same else None,  # it is that of the last token
        blocks=blocks,
        kept=kept_from(groups, blocks, size, there),
        writer=WRITER,
        nonce=new_nonce(),
    )
    return Session(made, whole.tokens[:count])
