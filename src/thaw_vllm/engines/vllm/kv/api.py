"""Python calls: freeze what an engine has cached, restore it into another."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UsageError
from ....format.identity import model_id as checked_model_id
from ....transport.writer import check_target
from .. import versions
from ..client import ask, call
from .core import path_of
from .jobs import PAUSE

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(frozen=True)
class KVFreezeReport:
    """What was written.

    Attributes:
        path: the file; the manifest's of several ranks.
        files: of every rank.
        bytes: of pages and table, all ranks.
        kept: of ``bytes``, those that several ranks hold alike and that are in another one's file.
        blocks: of tokens.
        prefixes: that no other continues.
        tokens: of the longest.
        seconds: everything counted, in the engine.
        skipped: blocks that are cached and were left out, by reason.
        phases: seconds of each, in order; of several ranks the slowest one's.
    """

    path: str
    files: list[str]
    bytes: int
    blocks: int
    prefixes: int
    tokens: int
    seconds: float
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KVRestoreReport:
    """What was thawed.

    Attributes:
        path: the file.
        blocks: pages' worth of tokens that are cached now and were not, counted by group.
        present: that were cached before.
        left_out: for want of room.
        prefixes: of the file.
        tokens: of the longest prefix that is cached whole now.
        bytes: moved, all ranks.
        seconds: everything counted, in the engine.
        phases: seconds of each, in order; of several ranks the slowest one's.
    """

    path: str
    blocks: int
    present: int
    left_out: int
    prefixes: int
    tokens: int
    bytes: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)


def freeze_kv_cache(
    llm: LLM,
    path: str | os.PathLike[str],
    *,
    prompts: str | Sequence[str] | None = None,
    token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    session: str | None = None,
    cache_salt: str | None = None,
    model_id: str | None = None,
    force: bool = False,
) -> KVFreezeReport:
    """Write an engine's cached prefixes to a ``.thawkv`` file, one for each rank.

    Args:
        llm: a ``vllm.LLM`` with prefix caching.
        path: the file, for several ranks the manifest.
        prompts: only what is cached of these, tokenised as the engine does; None for everything whose tokens are known.
        token_ids: likewise, as token ids: one list, or several.
        session: only the prefix of this running request.
        cache_salt: of the requests with these prompts or token ids.
        model_id: which weights the engine holds (``thaw id``), where it was not started from a snapshot.
        force: replace an existing file.

    Raises:
        UsageError: nothing of it is cached, or the model id is not known.
        UnsupportedError: a cache that this version cannot store exactly.
        ExistsError, SpaceError, StorageError: nothing was published; what was there before is untouched.

    Notes:
        The file holds the token ids, so the prompts, in the clear; its mode is 0600. Only full blocks are cached.
    """

    def tokenised(texts: Sequence[str]) -> list[list[int]]:
        tokenizer = llm.get_tokenizer()
        return [list(tokenizer.encode(text)) for text in texts]

    place = path_of(path)
    check_target(Path(place), force)
    prefixes = _prefixes(_texts(prompts, token_ids, session), token_ids, cache_salt, tokenised)
    options = {"path": place, "force": force, "prefixes": prefixes, "request": session, "model": _checked(model_id)}
    answer = call(llm, "thaw_kv_freeze", options | {"background": True})
    while "job" in answer:
        time.sleep(PAUSE)
        answer = call(llm, "thaw_kv_job", {"job": answer["job"]})
    return KVFreezeReport(**answer)


async def freeze_kv_cache_async(
    engine: AsyncLLM,
    path: str | os.PathLike[str],
    *,
    prompts: str | Sequence[str] | None = None,
    token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    session: str | None = None,
    cache_salt: str | None = None,
    model_id: str | None = None,
    force: bool = False,
) -> KVFreezeReport:
    """``freeze_kv_cache`` for an ``AsyncLLM``; its requests go on meanwhile.

    The blocks are held, which are full and never written to again, while a thread of the worker reads them; with
    several ranks the engine waits instead.
    """
    place = path_of(path)
    await asyncio.to_thread(check_target, Path(place), force)
    texts = _texts(prompts, token_ids, session)
    tokens = None if texts is None else [await versions.completion_tokens(engine, text) for text in texts]
    prefixes = _prefixes(texts, token_ids, cache_salt, lambda _: tokens or [])
    options = {"path": place, "force": force, "prefixes": prefixes, "request": session, "model": _checked(model_id)}
    return KVFreezeReport(**await ask(engine, "thaw_kv_freeze", options | {"background": True}))


async def restore_kv_cache_async(
    engine: AsyncLLM, path: str | os.PathLike[str], *, model_id: str | None = None, evict: bool = False
) -> KVRestoreReport:
    """``restore_kv_cache`` for an ``AsyncLLM``; its steps wait meanwhile."""
    options = {"path": path_of(path), "model": _checked(model_id), "evict": evict}
    return KVRestoreReport(**await ask(engine, "thaw_kv_restore", options))


def _texts(prompts: str | Sequence[str] | None, token_ids: object, session: str | None) -> list[str] | None:
    selections = {"prompts": prompts, "token_ids": token_ids, "session": session}
    given = [name for name, value in selections.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"give one of {' and '.join(given)}")
    return [prompts] if isinstance(prompts, str) else None if prompts is None else list(prompts)


def _prefixes(
    texts: list[str] | None,
    token_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    cache_salt: str | None,
    tokenised: Callable[[Sequence[str]], list[list[int]]],
) -> list[dict[str, Any]] | None:
    """What to freeze; None for everything."""
    if texts is not None:
        lists: list[Any] = tokenised(texts)
    elif token_ids is not None:
        lists = [token_ids] if token_ids and isinstance(token_ids[0], int) else list(token_ids)
    elif cache_salt is not None:
        raise UsageError("cache_salt belongs to prompts or token_ids; everything includes the salted ones")
    else:
        return None
    if not lists:
        raise UsageError("the list of prompts or token ids is empty; leave it out to freeze everything")
    return [{"tokens": list(ids), "salt": cache_salt} for ids in lists]


def restore_kv_cache(
    llm: LLM, path: str | os.PathLike[str], *, model_id: str | None = None, evict: bool = False
) -> KVRestoreReport:
    """Bring the blocks of a ``.thawkv`` file into an engine, so that requests with such a prefix skip its prefill.

    Args:
        llm: a ``vllm.LLM`` with the same weights, configuration and parallel sizes, and any number of blocks.
        path: the file, of several ranks the manifest.
        model_id: which weights the engine holds (``thaw id``), where it was not started from a snapshot.
        evict: let cached blocks that nobody uses make room, the least recently used first.

    Raises:
        MismatchError: blocks of other weights, of another configuration or layout; nothing was changed.
        FormatError, CorruptionError, StorageError: the file is unsound; the cache is as it was.

    Notes:
        Every page is verified before any is used.
    """
    options = {"path": path_of(path), "model": _checked(model_id), "evict": evict}
    return KVRestoreReport(**call(llm, "thaw_kv_restore", options))


def expect_kv_restore(llm: LLM) -> None:
    """Have an engine make ready for a restore, of a file or of a session, the first one being as fast as others then.

    On a GPU helper processes come up, with 56 MiB of page-locked memory in all, and wait ten minutes for it. Returns
    before they are there, 50 ms. ``load(..., kv_snapshot=...)`` and a server with ``THAW_KV_DIR`` need no such call.
    """
    call(llm, "thaw_kv_expect", {})


async def expect_kv_restore_async(engine: AsyncLLM) -> None:
    """``expect_kv_restore`` for an ``AsyncLLM``."""
    await ask(engine, "thaw_kv_expect", {})


def kv_cache_info(llm: LLM, *, model_id: str | None = None) -> dict[str, Any]:
    """Blocks of the pool, cached ones, those whose tokens are known, and the model id."""
    return call(llm, "thaw_kv_info", {"model": _checked(model_id)})


freeze_kv_cache_tp = freeze_kv_cache
restore_kv_cache_tp = restore_kv_cache


def _checked(model: str | None) -> str | None:
    return None if model is None else checked_model_id(model, "model_id")
