"""Sessions that a pool's engines keep: the tree that they are, and two of them compared. Engines are not asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import Query

from ..errors import FormatError, ThawError, UnknownSessionError, UsageError
from ..sessions.diff import difference, shared_blocks
from ..sessions.lineage import Node, forest
from ..sessions.nameless import nameless, without_paths
from ..sessions.record import MAX_HEAD, MAX_LABEL, Head, Session
from ..sessions.store import ABOUT, Store
from .router import Refused

MOST = 500
"""Sessions that are listed."""
MOST_TOKENS = 100
"""Token ids that are told of each side of where two sessions part."""
LONGEST = 1 << 22
"""Tokens of a session that is compared here: what more takes would keep the router's event loop waiting."""
TOLD = (
    *("id", "parent", "fork", "depth", "tokens", "prompt", "block_size", "blocks", "model", "labels", "finished"),
    *("created", "used", "pinned", "expires"),
)
"""What is told of a record: no sampling parameters, and nothing of where its model is."""

Word = Annotated[str, Query(min_length=1, max_length=MAX_LABEL, description="an id, how one begins, or a label")]
Tokens = Annotated[int, Query(ge=0, le=MOST_TOKENS, description="token ids to tell of each side of where they part")]


class KeptSessions:
    """Its routes."""

    def __init__(self, directory: str | None) -> None:
        """
        Args:
            directory: of the engines' store, in which there may be none yet; None: they keep no sessions.
        """
        self._directory = None if directory is None else os.path.abspath(directory)
        self._lock = asyncio.Lock()  # however many ask, one thread reads
        self._opened: tuple[tuple[int, ...], Store] | None = None

    async def listed(self) -> dict[str, Any]:
        """Sessions in the server's store, each after the one that it continues; where there are many, those used last.

        ``bytes`` are those of all blocks of a session, ``shared_bytes`` what of these its parent has, too: null where
        that one is not listed. Of a session whose blocks cannot be used there is an ``error`` instead.
        """
        async with self._lock:
            with _refusing():
                return await asyncio.to_thread(self._listed)

    async def difference(self, a: Word, b: Word, tokens: Tokens = 0) -> dict[str, Any]:
        """Where two sessions part and what they share, as ``thaw diff --json`` has it; and token ids, if asked for."""
        async with self._lock:
            with _refusing():
                return await asyncio.to_thread(self._difference, a, b, tokens)

    def _listed(self) -> dict[str, Any]:
        there = self._directory is not None and os.path.isdir(self._directory)
        told = {"directory": there, "time": round(time.time(), 3), "sessions": [], "broken": {}, "left_out": 0}
        if not there or (store := self._store()) is None:
            return told
        with nameless(str(store.directory)):
            listed, bad, left_out = store.latest(MOST)
        heads = {one.id: one.head for one in listed}
        return told | {
            "sessions": [_entry(store, node, heads) for node in forest(listed)],
            "broken": {id_: without_paths(str(error), str(store.directory)) for id_, error in bad.items()},
            "left_out": left_out,
        }

    def _difference(self, a: str, b: str, tokens: int) -> dict[str, Any]:
        store = self._store()
        if store is None:
            raise UnknownSessionError("this server keeps no sessions yet; see --sessions-dir")
        with nameless(str(store.directory)):
            ids = [store.find(word) for word in (a, b)]
            first, second = (_read(store, id_) for id_ in ids)
            found = difference(store, first, second)
        return found.shown(*ids) | (_around(first, second, found.common, tokens) if tokens else {})

    def _store(self) -> Store | None:
        """The one that was opened before where it is still that: it knows labels, which do not change.

        Raises:
            StorageError, FormatError: what is there cannot be used.
        """
        if self._directory is None or not os.path.exists(about := os.path.join(self._directory, ABOUT)):
            self._opened = None
            return None
        state = _state(self._directory) + _state(about)
        if self._opened is None or self._opened[0] != state:
            self._opened = None
            with nameless(self._directory):
                self._opened = state, Store(self._directory)
        store = self._opened[1]
        store.forget_contexts()  # they may be damaged, or gone
        return store


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What cannot be read is answered 422."""
    try:
        yield
    except FormatError as error:
        raise Refused(422, type(error).__name__, str(error)) from None


def _state(path: str) -> tuple[int, ...]:
    """Changes with what is there, and with who may write to it."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _read(store: Store, id_: str) -> Session:
    """Raises:
    UsageError: it is too long to be compared here. Others: as ``Store.read``.
    """
    refusal = UsageError(f"the session {id_[:12]} has more than {LONGEST} tokens; thaw diff compares such sessions")
    with contextlib.suppress(OSError):  # which reading it tells
        if store.record(id_).stat().st_size > MAX_HEAD + 4 * LONGEST:
            raise refusal
    found = store.read(id_)
    if found.head.count > LONGEST:
        raise refusal
    return found


def _entry(store: Store, node: Node, heads: Mapping[str, Head]) -> dict[str, Any]:
    head, shown = node.one.head, node.shown()
    told = {name: shown[name] for name in TOLD}
    parent = None if head.parent is None else heads.get(head.parent)
    try:
        page = sum(context.page for context in store.contexts(head))
    except ThawError as error:
        return told | {"error": without_paths(str(error), str(store.directory))}
    shared: int | None = None if head.parent is not None else 0
    if parent is not None and head.fork is not None:
        shared = shared_blocks(head, parent, head.fork) * page
    return told | {"bytes": head.files * page, "shared_bytes": shared}


def _around(a: Session, b: Session, common: int, count: int) -> dict[str, Any]:
    """Token ids before and after where two sessions part; ``from`` is the number of the first of them."""
    begin, end = max(0, common - count), common + count
    told = {"from": begin, "common": a.tokens[begin:common].tolist()}
    return {"token_ids": told | {"a": a.tokens[common:end].tolist(), "b": b.tokens[common:end].tolist()}}
