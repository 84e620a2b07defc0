"""Room made in a store: blocks that no session names, sessions that have expired, and those used longest ago."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import StorageError, ThawError, UsageError, VersionError
from ..transport.writer import remove_stale
from ..weights.cache import limit as gigabytes_limit
from .blocks import Name, name_of
from .record import now
from .store import Store

GB_VARIABLE = "THAW_SESSIONS_GB"


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be.

    Attributes:
        sessions: their ids: those that have expired, then those that a budget took, the one used longest ago first.
        expired: the former.
        blocks: files.
        freed: bytes of these.
        left: bytes of blocks that stay.
        over: bytes by which what stays is more than it may be: pinned sessions hold it.
    """

    sessions: tuple[str, ...]
    expired: tuple[str, ...]
    blocks: int
    freed: int
    left: int
    over: int


def limit(gigabytes: float | None) -> int | None:
    """Bytes that a store may take: of ``--budget-gb``, else ``$THAW_SESSIONS_GB``; None: nobody said.

    Raises:
        UsageError: it is no number from 0.
    """
    return gigabytes_limit(gigabytes, "--budget-gb", GB_VARIABLE)


def collect(store: Store, budget: int | None = None, *, expire: bool = True, dry_run: bool = False) -> Collected:
    """Remove sessions that have expired and what none needs; with a budget also others, until blocks fit in it.

    Of these the ones used longest ago go first. What branches off a session that goes stays, with all of its blocks.
    This machine's clock says what has expired.

    Which blocks are needed follows from the records alone, counted anew each time: a process that was killed in the
    middle of anything leaves at most files that nobody needs.

    Args:
        budget: bytes of blocks; None: no session is removed that has not expired. Pinned sessions stay.
        expire: remove sessions that have expired.
        dry_run: remove nothing.

    Raises:
        StorageError: a record cannot be read, so that it is not known what it needs; nothing was removed.
    """
    with store.alone():
        store.forget_contexts()
        listed, bad = store.listed()
        if bad:
            raise _unknown(store, bad)
        needed: dict[str, set[Name]] = {}
        for one in listed:
            try:
                session = store.read(one.id)
            except UsageError:  # a record that somebody has deleted meanwhile
                continue
            except ThawError as error:
                raise _unknown(store, {one.id: error}) from None
            try:
                needed[one.id] = {name for _, name in store.names(session)}
            except ThawError as error:
                raise _unknown(store, {one.id: error}) from None
        listed = [one for one in listed if one.id in needed]
        sizes = {name: path.stat().st_size for path in store.block_files() if (name := name_of(path))}
        at = now()
        expired = [one.id for one in listed if expire and one.head.expired(at) and not one.pinned]
        listed = [one for one in listed if one.id not in expired]
        counts = Counter(name for one in listed for name in needed[one.id])
        there = sum(size for name, size in sizes.items() if name in counts)
        gone: list[str] = []
        held = {name for one in listed if one.pinned for name in needed[one.id]}
        for one in sorted(listed, key=lambda one: (one.used, one.head.created)):
            if budget is None or there <= budget:
                break
            if one.pinned or needed[one.id] <= held:  # it would make no room
                continue
            gone.append(one.id)
            counts.subtract(needed[one.id])
            there -= sum(sizes.get(name, 0) for name in needed[one.id] if not counts[name])
        for id_ in reversed([*gone]):  # what made no room by itself, or less than was too much, stays after all
            extra = sum(sizes.get(name, 0) for name in needed[id_] if not counts[name])
            if budget is not None and there + extra <= budget:
                gone.remove(id_)
                counts.update(needed[id_])
                there += extra
        unneeded = [name for name in sizes if not counts[name]]
        if not dry_run:
            contexts = {id_ for one in listed if one.id not in gone for id_ in one.head.contexts}
            _remove(store, expired + gone, unneeded, contexts)
        over = 0 if budget is None else max(0, there - budget)
        freed = sum(sizes[name] for name in unneeded)
        return Collected((*expired, *gone), tuple(expired), len(unneeded), freed, there, over)


def _remove(store: Store, sessions: list[str], unneeded: list[Name], contexts: Collection[str]) -> None:
    for id_ in sessions:  # first: a record without its blocks would be worse than blocks without a record
        store.remove(id_)
    for name in unneeded:
        with contextlib.suppress(FileNotFoundError):
            name.path(store.blocks).unlink()
    for id_ in store.context_ids() - set(contexts):
        store.remove_context(id_)
    for below in store.directories():
        remove_stale(below, "*")


def _unknown(store: Store, bad: dict[str, ThawError]) -> StorageError:
    id_, error = next(iter(bad.items()))
    cure = f"thaw rm {id_} forgets it" if isinstance(error, StorageError) else "thaw fsck --repair takes it out"
    if isinstance(error, VersionError):
        cure = f"use that version, or forget it (thaw rm {id_})"
    return StorageError(
        f"the session {id_} in {str(store.directory)!r} cannot be read, so what it needs is not known, and nothing was "
        f"removed: {error}; {cure}"
    )
