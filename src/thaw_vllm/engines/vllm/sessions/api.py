"""Python calls: keep what a request has come to, and take a session up again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError, UsageError
from ....format.identity import model_id as checked_model_id
from ....kv.table import storable
from ....sessions.context import Context
from ....sessions.diff import common_tokens
from ....sessions.in_use import in_use
from ....sessions.record import Head, Session, checked_labels, expiry, ids, new_nonce, now
from ....sessions.store import Store
from ..client import ask, call
from . import sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

StorePath = Store | str | os.PathLike[str] | None
"""A store, its directory, or None for the default one."""


@dataclass(frozen=True)
class CheckpointReport:
    """What was kept.

    Attributes:
        session: its id.
        store: the directory.
        tokens: of the session.
        blocks: that are kept of it, of tokens.
        added: files of blocks that the store did not have.
        bytes: of those.
        seconds: in the engine.
        phases: seconds of each, in order; of several ranks the slowest one's.
        expires: seconds since 1970; None: it stays.
    """

    session: str
    store: str
    tokens: int
    blocks: int
    added: int
    bytes: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    expires: float | None = None


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """A session in an engine: its blocks are cached.

    Attributes:
        session: its id.
        tokens: of the session, and what was appended.
        blocks, present, left_out: as of ``KVRestoreReport``.
        lost: blocks that the store lacks.
        cached: tokens whose keys and values need not be computed again.
        bytes: moved, all ranks.
        seconds, phases: in the engine.
    """

    session: str
    tokens: int
    blocks: int
    present: int
    left_out: int
    lost: int
    cached: int
    bytes: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkout(RestoreReport):
    """The same, and the request that goes on.

    Attributes:
        prompt: for ``generate``: all tokens, and the salt.
        sampling_params: for ``generate``: the session's own, less what was generated, or those that were given.
        inexact: names of parameters by which the continuation may differ from what the session would have gone on
            with; empty: by none. vLLM's V2 runner goes on exactly by all that its V1 runner would begin anew.
        store: the directory that it is kept in.
    """

    prompt: dict[str, Any] = field(repr=False)
    sampling_params: SamplingParams
    inexact: tuple[str, ...]
    store: str


def checkpoint(
    llm: LLM,
    what: RequestOutput | Sequence[int] | str,
    *,
    sampling_params: SamplingParams | None = None,
    index: int = 0,
    parent: str | None = None,
    labels: Sequence[str] = (),
    ttl: float | None = None,
    cache_salt: str | None = None,
    store: StorePath = None,
    model_id: str | None = None,
) -> CheckpointReport:
    """Keep a session: its tokens, how it was sampled, and the blocks of keys and values that the engine has of it.

    Args:
        llm: a ``vllm.LLM`` with prefix caching.
        what: an answer of ``generate``; token ids, all of which count as given; or the id of a running request.
        sampling_params: that an answer was generated with; a running request has its own.
        index: which of several continuations of an answer.
        parent: the session that it went on from, as ``Store.find`` takes it.
        labels: names of yours for it.
        ttl: seconds until it expires, after which ``thaw gc`` may remove it; None: it does not.
        cache_salt: of the request, where it had one; a running request has its own.
        store: where to keep it; made where there is none.
        model_id: which weights the engine holds (``thaw id``), where it was not started from a snapshot.

    Raises:
        UsageError: there is no such request or session, or the model id is not known.
        UnsupportedError: a cache, or a request, that this version cannot keep exactly.
        SpaceError, StorageError: nothing was published.

    Notes:
        Only whole blocks that are cached are kept; a session without any is its tokens alone.
    """
    made = _Checkpoint(what, sampling_params, index, parent, labels, ttl, cache_salt, store, model_id)
    with made.store.use():
        return made.publish(call(llm, "thaw_session_keep", made.options))


async def checkpoint_async(
    engine: AsyncLLM,
    what: RequestOutput | Sequence[int] | str,
    *,
    sampling_params: SamplingParams | None = None,
    index: int = 0,
    parent: str | None = None,
    labels: Sequence[str] = (),
    ttl: float | None = None,
    cache_salt: str | None = None,
    store: StorePath = None,
    model_id: str | None = None,
) -> CheckpointReport:
    """``checkpoint`` for an ``AsyncLLM``; its steps wait meanwhile, the event loop does not."""
    made = await asyncio.to_thread(
        _Checkpoint, what, sampling_params, index, parent, labels, ttl, cache_salt, store, model_id
    )
    async with in_use(made.store) as use:
        answer = await use.outliving(ask(engine, "thaw_session_keep", made.options))
        return await use.thread(made.publish, answer)


def checkout(
    llm: LLM,
    session: str,
    *,
    append: Sequence[int] = (),
    sampling_params: SamplingParams | None = None,
    store: StorePath = None,
    model_id: str | None = None,
    evict: bool = False,
) -> Checkout:
    """Bring a session's blocks into an engine, ready to go on.

    Args:
        llm: a ``vllm.LLM`` with the same weights, configuration and parallel sizes.
        session: an id, how one begins, or a label.
        append: token ids that follow, as of the next question; then nothing of the answer before binds the next one.
        sampling_params: in place of the session's own.
        store: where it is kept.
        model_id: which weights the engine holds (``thaw id``), where it was not started from a snapshot.
        evict: let cached blocks that nobody uses make room, the least recently used first; they are gone even where
            a file then turns out to be unsound.

    Raises:
        UsageError: there is no such session; it is finished, and neither tokens nor parameters say how to go on.
        MismatchError: blocks of other weights, of another configuration or layout; nothing was changed.
        FormatError, CorruptionError, StorageError: a file is unsound; nothing of it is used, and nothing that was
            cached is lost unless ``evict`` allowed it.
    """
    found = _Checkout(session, append, sampling_params, store, model_id, evict)
    with found.store.use():
        return found.done(call(llm, "thaw_session_restore", found.options))


async def checkout_async(
    engine: AsyncLLM,
    session: str,
    *,
    append: Sequence[int] = (),
    sampling_params: SamplingParams | None = None,
    store: StorePath = None,
    model_id: str | None = None,
    evict: bool = False,
) -> Checkout:
    """``checkout`` for an ``AsyncLLM``; its steps wait meanwhile, the event loop does not."""
    found = await asyncio.to_thread(_Checkout, session, append, sampling_params, store, model_id, evict)
    async with in_use(found.store) as use:
        answer = await use.outliving(ask(engine, "thaw_session_restore", found.options))
        return await use.thread(found.done, answer)


async def restore_session_async(
    engine: AsyncLLM,
    session: str,
    *,
    store: StorePath = None,
    model_id: str | None = None,
    evict: bool = False,
) -> tuple[RestoreReport, Session]:
    """``checkout_async`` without a request that goes on, so of finished sessions as well; and the session.

    Raises:
        As ``checkout``.
    """
    found = await asyncio.to_thread(_Restore, session, store, model_id, evict)
    async with in_use(found.store) as use:
        answer = await use.outliving(ask(engine, "thaw_session_restore", found.options))
        return RestoreReport(**await use.thread(found.report, answer)), found.whole


def resume(
    llm: LLM,
    session: str,
    *,
    append: Sequence[int] = (),
    sampling_params: SamplingParams | None = None,
    exact: bool = False,
    store: StorePath = None,
    model_id: str | None = None,
    evict: bool = False,
) -> tuple[RequestOutput, Checkout]:
    """``checkout``, and generating goes on.

    Args:
        exact: refuse where a parameter of the session would not be as if it had gone on (``Checkout.inexact``).

    Returns:
        vLLM's answer, whose outputs are the new tokens, and what it was made of.

    Raises:
        As ``checkout``; UnsupportedError: ``exact``, and it would not be.
    """
    found = _Checkout(session, append, sampling_params, store, model_id, evict)
    if exact:
        found.require_exact()
    with found.store.use():
        there = found.done(call(llm, "thaw_session_restore", found.options))
    prompt: Any = there.prompt
    (output,) = llm.generate([prompt], there.sampling_params, use_tqdm=False)
    return output, there


class _Checkpoint:
    """The front end's share: what the engine is asked, and the record that comes of it."""

    def __init__(
        self,
        what: RequestOutput | Sequence[int] | str,
        sampling_params: SamplingParams | None,
        index: int,
        parent: str | None,
        labels: Sequence[str],
        ttl: float | None,
        salt: str | None,
        store: StorePath,
        model_id: str | None,
    ) -> None:
        self.store = _opened(store, create=True)
        self._labels, self._sampling, self._finished = checked_labels(labels), sampling.to_json(sampling_params), None
        expiry(now(), ttl)  # refused before an engine is asked
        self._ttl = ttl
        self._parent = None if parent is None else self.store.find(parent)
        self._before = None if self._parent is None else self.store.read(self._parent)
        self.options: dict[str, Any] = {
            "store": os.fspath(self.store.directory),
            "model": None if model_id is None else checked_model_id(model_id, "model_id"),
        }
        if isinstance(what, str):
            if sampling_params is not None or salt is not None:
                raise UsageError("a running request has its own sampling parameters and salt")
            self.options["request"], self._prompt = what, None
            return
        if getattr(what, "lora_request", None) is not None:
            raise UnsupportedError("an answer made with an adapter is more than its tokens; not in this version")
        if salt is not None and not storable(salt):
            raise UsageError("this cache salt is longer than a record can hold, or has characters that none can")
        tokens, self._prompt = _tokens(what), None
        if (outputs := getattr(what, "outputs", None)) is not None:
            if not 0 <= index < len(outputs):
                raise UsageError(f"the answer has {len(outputs)} continuations; there is none of index {index}")
            before = sampling.generated(sampling_params, tokens)
            self._prompt, self._finished = len(tokens) - before, outputs[index].finish_reason
            tokens += outputs[index].token_ids
            if sampling_params is not None and before:
                self._sampling = sampling.to_json(sampling.whole(sampling_params, before))
            if self._sampling is not None:
                self._sampling = sampling.of_continuation(self._sampling, index)
        self._prompt = len(tokens) if self._prompt is None else self._prompt
        self.options |= {"tokens": ids(tokens).tolist(), "salt": salt}

    def publish(self, found: dict[str, Any]) -> CheckpointReport:
        """The session, of what the engine has answered."""
        tokens, created = ids(found["tokens"]), now()
        head = Head(
            count=len(tokens),
            prompt=found["prompt"] if self._prompt is None else self._prompt,
            model=found["model"],
            block_size=found["block_size"],
            blocks=found["blocks"],
            kept=tuple(found["kept"]),
            contexts=tuple(Context.from_json(one).id for one in found["contexts"]),
            created=created,
            parent=self._parent,
            labels=self._labels,
            finished=self._finished,
            sampling=found["sampling"] if self._sampling is None else self._sampling,
            salt=found["salt"],
            source=found["source"],
            writer=found["writer"],
            nonce=new_nonce(),
            expires=expiry(created, self._ttl),
        )
        made = Session(head if self._before is None else replace(head, fork=0), tokens)
        if self._before is not None:
            made = Session(replace(head, fork=common_tokens(self._before, made)), tokens)
        id_ = self.store.publish(made, [Context.from_json(one) for one in found["contexts"]])
        return CheckpointReport(
            id_,
            os.fspath(self.store.directory),
            len(tokens),
            found["blocks"],
            found["added"],
            found["bytes"],
            found["seconds"],
            found["phases"],
            head.expires,
        )


class _Restore:
    """Likewise."""

    def __init__(self, session: str, store: StorePath, model_id: str | None, evict: bool) -> None:
        self.store = _opened(store)
        self._id = self.store.find(session)
        self.whole = self.store.read(self._id)
        self.options: dict[str, Any] = {
            "store": os.fspath(self.store.directory),
            "session": self._id,
            "model": None if model_id is None else checked_model_id(model_id, "model_id"),
            "evict": evict,
        }

    def report(self, found: dict[str, Any]) -> dict[str, Any]:
        """What a ``RestoreReport`` is made of, of what the engine has answered."""
        self.store.touch(self._id)
        same = ("blocks", "present", "left_out", "lost", "bytes", "seconds", "phases")
        told = {name: found[name] for name in same}
        return told | {"session": self._id, "tokens": self.whole.head.count, "cached": found["tokens"]}


class _Checkout(_Restore):
    def __init__(
        self,
        session: str,
        append: Sequence[int],
        sampling_params: SamplingParams | None,
        store: StorePath,
        model_id: str | None,
        evict: bool,
    ) -> None:
        super().__init__(session, store, model_id, evict)
        self._sampling, self._inexact = _sampling(self.whole.head, bool(append), sampling_params)
        self._tokens = [*self.whole.tokens.tolist(), *ids(append).tolist()]

    def require_exact(self) -> None:
        """Have the engine refuse where it cannot go on exactly.

        Raises:
            UnsupportedError: none can.
        """
        if never := sampling.still_inexact(self._inexact):
            raise UnsupportedError(f"no engine goes on exactly by {', '.join(never)}; leave out exact")
        self.options["exact"] = self._inexact

    def done(self, found: dict[str, Any]) -> Checkout:
        """What the engine has answered, and the request."""
        prompt: dict[str, Any] = {"prompt_token_ids": self._tokens}
        if self.whole.head.salt is not None:
            prompt["cache_salt"] = self.whole.head.salt
        told = self.report(found) | {"tokens": len(self._tokens), "store": os.fspath(self.store.directory)}
        inexact = sampling.still_inexact(self._inexact) if found["rebuilds"] else self._inexact
        return Checkout(prompt=prompt, sampling_params=self._sampling, inexact=inexact, **told)


def _sampling(head: Head, appended: bool, given: SamplingParams | None) -> tuple[SamplingParams, tuple[str, ...]]:
    from vllm import SamplingParams

    if given is not None:
        return given, ()
    if appended or head.sampling is None:
        if not appended:
            raise UsageError("it is not known how this session was sampled; pass sampling_params")
        return sampling.from_json(head.sampling or {}) if head.sampling else SamplingParams(), ()
    if head.finished is not None and head.finished != "abort":
        raise UsageError(
            f"the session is finished ({head.finished}); append tokens, pass sampling_params, or branch at an earlier "
            "token"
        )
    return sampling.going_on(head.sampling, head.count - head.prompt, head.count)


def _tokens(what: Any) -> list[int]:
    given = getattr(what, "prompt_token_ids", what)
    if given is None:
        raise UsageError("the answer does not say the tokens of its prompt; pass token ids")
    return list(given)


def _opened(store: StorePath, *, create: bool = False) -> Store:
    return store if isinstance(store, Store) else Store(store, create=create)
