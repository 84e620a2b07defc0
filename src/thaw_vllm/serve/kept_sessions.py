"""Sessions that a pool's engines keep: the tree that they are, and two of them compared. Engines are not asked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Query

from ..errors import ThawError, UsageError
from ..sessions.diff import difference, shared_blocks
from ..sessions.lineage import Node, forest
from ..sessions.nameless import nameless, without_paths
from ..sessions.record import MAX_LABEL, Head, Session
from ..sessions.store import ABOUT, Store

MOST = 500
"""Sessions that are listed."""
MOST_TOKENS = 100
"""Token ids that are told of each side of where two sessions part."""
TOLD = (
    *("id", "parent", "fork", "depth", "tokens", "prompt", "block_size", "blocks", "model", "labels", "finished"),
    *("created", "used", "pinned"),
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

    async def listed(self) -> dict[str, Any]:
        """Sessions in the server's store, each after the one that it continues; where there are many, those used last.

        ``bytes`` are those of all blocks of a session, ``shared_bytes`` what of these its parent has, too: null where
        that one is not listed. Of a session whose blocks cannot be used there is an ``error`` instead.
        """
        async with self._lock:
            return await asyncio.to_thread(self._listed)

    async def difference(self, a: Word, b: Word, tokens: Tokens = 0) -> dict[str, Any]:
        """Where two sessions part and what they share, as ``thaw diff --json`` has it; and token ids, if asked for."""
        async with self._lock:
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
            raise UsageError("this server keeps no sessions yet; see --sessions-dir")
        with nameless(str(store.directory)):
            ids = [store.find(word) for word in (a, b)]
            first, second = (store.read(id_) for id_ in ids)
            found = difference(store, first, second)
        return found.shown(*ids) | (_around(first, second, found.common, tokens) if tokens else {})

    def _store(self) -> Store | None:
        """Raises:
        StorageError, FormatError: what is there cannot be used.
        """
        if self._directory is None or not os.path.exists(os.path.join(self._directory, ABOUT)):
            return None
        with nameless(self._directory):
            return Store(self._directory)


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
