"""Which tokens a cached block stands for: vLLM keeps hashes only, and hashes say nothing elsewhere."""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

from ....kv.table import storable
from .. import versions

_ROOM = 4096
"""Entries kept beyond two for each block of the pool before those of evicted blocks are dropped."""
_NAME, _LIMIT = "_thaw_prefixes", "_thaw_prefixes_limit"


class Entry(NamedTuple):
    """What is known of a block hash.

    Attributes:
        parent: hash of the block before it; None for a first block.
        tokens: 32-bit token ids.
        salt: cache salt, of a first block.
        foreign: why the block means something only in the engine that made it; empty if it does not.
    """

    parent: bytes | None
    tokens: bytes
    salt: str | None
    foreign: str


def install() -> None:
    """Note the tokens of blocks as they are cached; a second call does nothing.

    vLLM tells of cached blocks by events only, which have to be configured and are sent elsewhere; so the one method
    that caches full blocks is wrapped. It costs a dictionary's lookup a block and group.
    """
    pool = versions.block_pool_class()
    real = pool.cache_full_blocks
    if getattr(real, "_thaw", False):
        return

    @functools.wraps(real)
    def cache_full_blocks(
        self: Any,
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        real(self, request, blocks, num_cached_blocks, num_full_blocks, block_size, *args, **kwargs)
        if block_size == self.hash_block_size:
            record(self, request, num_cached_blocks, num_full_blocks)

    cache_full_blocks._thaw = True  # type: ignore[attr-defined]
    pool.cache_full_blocks = cache_full_blocks


def known(pool: Any) -> dict[bytes, Entry]:
    """What was recorded for a pool."""
    found: dict[bytes, Entry] | None = getattr(pool, _NAME, None)
    if found is None:
        found = {}
        setattr(pool, _NAME, found)
    return found


def record(pool: Any, request: Any, first: int, last: int) -> None:
    """Note blocks ``first`` to ``last`` of a request, which are cached now."""
    entries, hashes, size = known(pool), request.block_hashes, pool.hash_block_size
    for number in range(first, min(last, len(hashes))):
        name = bytes(hashes[number])
        if name in entries:
            continue
        tokens = array("i", request.all_token_ids[number * size : (number + 1) * size]).tobytes()
        parent = bytes(hashes[number - 1]) if number else None
        entries[name] = Entry(parent, tokens, request.cache_salt if not number else None, _foreign(request))
    if len(entries) > getattr(pool, _LIMIT, 2 * pool.num_gpu_blocks + _ROOM):
        _prune(pool, entries)


def note(
    entries: dict[bytes, Entry], name: bytes, parent: bytes | None, tokens: tuple[int, ...], salt: str | None
) -> None:
    """Note a block that was thawed among those that are ``known``."""
    if name not in entries:
        entries[name] = Entry(parent, array("i", tokens).tobytes(), salt, "")


def _foreign(request: Any) -> str:
    if request.lora_request is not None:
        return "made with a LoRA adapter"
    if getattr(request, "mm_features", None):
        return "of requests with images, audio or video"
    if getattr(request, "prompt_embeds", None) is not None:
        return "of requests with prompt embeddings"
    if request.cache_salt is not None and not storable(request.cache_salt):
        return "of requests with a cache salt that cannot be stored"
    return ""


def _prune(pool: Any, entries: dict[bytes, Entry]) -> None:
    """Keep what is cached, and the prefixes of it."""
    kept: dict[bytes, Entry] = {}
    for block in versions.cached_blocks(pool):
        name: bytes | None = versions.hash_of(block)
        while name is not None and name not in kept and name in entries:
            kept[name] = entries[name]
            name = entries[name].parent
    entries.clear()
    entries.update(kept)
    # Under a sliding window long prefixes outlive their blocks: then it is long until the next look.
    setattr(pool, _LIMIT, max(2 * pool.num_gpu_blocks + _ROOM, 2 * len(kept)))
