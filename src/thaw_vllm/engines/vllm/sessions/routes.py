"""Routes of vLLM's own server that keep sessions and take them up again; ``kv/routes.py`` adds them.

What they tell names files and directories of the server by their last part, if at all.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, dataclass
from typing import Any

from ....errors import UsageError
from ....sessions.branch import grow
from ....sessions.in_use import in_use
from ....sessions.lineage import forest
from ....sessions.nameless import STORE, nameless, without_paths
from ....sessions.store import ABOUT, Store
from .. import versions
from ..kv.bodies import Branching, CheckingOut, Checkpointing
from .api import checkpoint_async, restore_session_async


@dataclass(frozen=True)
class Sessions:
    """A server's.

    Attributes:
        client: vLLM's, of its engine.
        directory: of the store, absolute; it is there, the store in it perhaps not yet.
    """

    client: Any
    directory: str

    async def listed(self) -> dict[str, Any]:
        """The records as ``thaw log`` has them, and what is the matter with those that cannot be read."""
        with nameless(self.directory):
            return await asyncio.to_thread(self._listed)

    async def checkpoint(self, body: Checkpointing) -> dict[str, Any]:
        """``checkpoint_async``."""
        what: list[int] | str | None = body.request if body.token_ids is None else body.token_ids
        if what is None:
            assert body.prompt is not None
            what = await versions.completion_tokens(self.client, body.prompt)
        with nameless(self.directory):
            report = await checkpoint_async(
                self.client,
                what,
                parent=body.parent,
                labels=body.labels,
                ttl=body.ttl,
                cache_salt=body.cache_salt,
                store=self.directory,
                model_id=body.model_id,
            )
        return {name: value for name, value in asdict(report).items() if name != "store"}

    async def checkout(self, body: CheckingOut) -> dict[str, Any]:
        """``restore_session_async``; the tokens only where they are asked for."""
        with nameless(self.directory):
            store = await self._store(body.session)
            report, session = await restore_session_async(
                self.client, body.session, store=store, model_id=body.model_id, evict=body.evict
            )
        told = asdict(report)
        if body.token_ids:
            head = session.head
            told |= {"token_ids": session.tokens.tolist(), "salted": head.salt is not None}
            told |= {"generated": head.count - head.prompt, "sampling": head.sampling}
        return told

    async def branch(self, body: Branching) -> dict[str, Any]:
        """The record of a new session that begins like another; the engine is not asked."""

        def made() -> dict[str, Any]:
            id_ = grow(store, body.session, body.at, body.labels, body.ttl)
            return _shown(store.read(id_).head.shown(id_))

        with nameless(self.directory):
            store = await self._store(body.session)
            async with in_use(store) as use:
                return await use.thread(made)

    def _listed(self) -> dict[str, Any]:
        if not self._there():
            return {"sessions": [], "broken": {}}
        listed, bad = Store(self.directory).listed()
        broken = {id_: without_paths(str(error), self.directory) for id_, error in bad.items()}
        return {"sessions": [_shown(node.shown()) for node in forest(listed)], "broken": broken}

    async def _store(self, session: str) -> Store:
        """Raises:
        UsageError: it was not made yet, so there is no such session.
        """
        if not await asyncio.to_thread(self._there):
            raise UsageError(f"there is no session {session!r} in {STORE}, which is empty")
        return await asyncio.to_thread(Store, self.directory)

    def _there(self) -> bool:
        return os.path.exists(os.path.join(self.directory, ABOUT))


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record, its model named as on the hub, or by the last part of a path."""
    source = record["source"]
    if source is not None and (source.startswith((".", "/")) or source.count("/") > 1):
        source = os.path.basename(source.rstrip("/"))
    return record | {"source": source}
