"""Which cached blocks a freeze takes, with the tokens they stand for."""

from __future__ import annotations

from array import array
from typing import Any

from ....format.kv import Layout
from ....kv.table import NONE, Builder
from .. import versions
from . import recorder


class Selection:
    """Cached blocks of prefixes, and a slot for each physical block among them.

    A group with a window keeps the pages of a prefix's end only. Groups without need all of them: a block is worth
    nothing once one before it is gone.
    """

    def __init__(self, core: Any, pool: Any, layout: Layout) -> None:
        self._core, self._pool, self._groups = core, pool, len(layout.groups)
        self._key = versions.block_keys()
        self._whole = [number for number, group in enumerate(layout.groups) if group.window is None]
        self.builder = Builder(pool.hash_block_size, self._groups)
        self.ids: list[int] = []
        self.skipped: dict[str, int] = {}
        self._slots: dict[int, int] = {}

    def prefix(self, tokens: list[int], salt: str | None) -> None:
        """As far as it is cached."""
        hashed, size = versions.block_hasher(self._core), self._pool.hash_block_size
        found: list[tuple[tuple[int, ...], bytes, str | None]] = []
        name, last = None, 0
        for at in range(0, len(tokens) - size + 1, size):
            ids = tuple(tokens[at : at + size])
            own = salt if at == 0 else None
            name = hashed(name, ids, own)
            if self._broken(name):
                break
            found.append((ids, name, own))
            last = len(found) if self._cached(name) else last
        parent = NONE
        for ids, name, own in found[:last]:
            parent = self.builder.add(parent, ids, self._slots_of(name), name, own)

    def everything(self) -> None:
        """Every cached block whose prefix is known from its first token on."""
        entries, placed = recorder.known(self._pool), dict[bytes, int]()
        seen = set[bytes]()
        for block in versions.cached_blocks(self._pool):
            name = versions.hash_of(block)
            if name in seen:
                continue
            seen.add(name)
            chain, at = list[bytes](), name
            why = ""
            while at not in placed:
                entry = entries.get(at)
                if entry is None:
                    why = "of which the tokens are not known: cached before thaw was there, or moved since"
                    break
                if entry.foreign or self._broken(at):
                    why = entry.foreign or "whose prefix is cached no more"
                    break
                chain.append(at)
                if entry.parent is None:
                    break
                at = entry.parent
            if why:
                self.skipped[why] = self.skipped.get(why, 0) + 1
                continue
            for name in reversed(chain):
                entry = entries[name]
                parent = NONE if entry.parent is None else placed[entry.parent]
                ids = tuple(array("i", entry.tokens))
                placed[name] = self.builder.add(parent, ids, self._slots_of(name), name, entry.salt)

    def _cached(self, name: bytes) -> bool:
        keys = (self._key(name, group) for group in range(self._groups))
        return any(versions.cached_block(self._pool, key) is not None for key in keys)

    def _broken(self, name: bytes) -> bool:
        """Whether a group that needs the block does not have it."""
        keys = (self._key(name, group) for group in self._whole)
        return any(versions.cached_block(self._pool, key) is None for key in keys)

    def _slots_of(self, name: bytes) -> tuple[int, ...]:
        found = []
        for group in range(self._groups):
            block = versions.cached_block(self._pool, self._key(name, group))
            if block is None:
                found.append(NONE)
                continue
            if block.block_id not in self._slots:
                self._slots[block.block_id] = len(self.ids)
                self.ids.append(block.block_id)
            found.append(self._slots[block.block_id])
        return tuple(found)
