"""Many continuations of one beginning, which is computed once and shared."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....errors import ThawError, UsageError
from ....sessions.record import expiry, now
from ....sessions.store import Store
from ..client import require_awake
from . import sampling
from .api import Checkout, CheckpointReport, checkout, checkout_async, checkpoint, checkpoint_async

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_numbers = itertools.count()


@dataclass(frozen=True)
class Branch:
    """One of several continuations, once it has ended.

    Attributes:
        number: from 0.
        output: vLLM's answer; its outputs are the new tokens.
        parent: the session that it branched off; None: the beginning is not kept.
        session: under which it is kept itself; None: it is not.
        error: why it could not be kept, where it should have been.
    """

    number: int
    output: RequestOutput
    parent: str | None = None
    session: str | None = None
    error: ThawError | None = None


def fork(
    llm: LLM,
    beginning: Checkout | CheckpointReport | str | Sequence[int],
    n: int,
    sampling_params: SamplingParams | None = None,
    *,
    append: Sequence[Sequence[int]] = (),
    keep: bool = False,
    labels: Sequence[str] = (),
    ttl: float | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    model_id: str | None = None,
) -> Iterator[Branch]:
    """N continuations of one beginning in one engine, each as soon as it has ended.

    The beginning is computed once, or comes from a session; the requests share its blocks.

    Args:
        llm: a ``vllm.LLM`` with prefix caching, that runs nothing else meanwhile.
        beginning: a prompt, as text or as token ids; or a session: what ``checkout`` or ``checkpoint`` gave.
        n: how many.
        sampling_params: of each; None: a session's own, less what it has generated unless tokens are appended, or
            vLLM's defaults. A seed is that of the first one, and the others' are the numbers after it, so that they
            differ.
        append: token ids that follow the beginning, for each its own: other hypotheses, the next question.
        keep: each is kept as a session that branches off the beginning's, which is kept first where it is a prompt.
            One that cannot be kept is given with its error.
        labels: for each its own.
        ttl: seconds until what is kept expires, a beginning that is kept first too; None: it does not.
        store: where sessions are kept; None: where the beginning is, or the default one.
        model_id: which weights the engine holds (``thaw id``), where it was not started from a snapshot.

    Raises:
        UsageError: numbers that do not agree; all continuations would be the same.
        As ``checkpoint`` and ``checkout``.
    """
    require_awake(llm)
    if llm.llm_engine.has_unfinished_requests():
        raise UsageError("the engine has requests under way; fork when they have ended")
    return _forked(llm, beginning, _Plan(n, append, labels, ttl, sampling_params, keep, store, model_id))


def _forked(llm: LLM, beginning: Any, plan: _Plan) -> Iterator[Branch]:
    engine: Any = llm.llm_engine
    plan.at(beginning)
    if isinstance(beginning, CheckpointReport):
        beginning = checkout(llm, beginning.session, sampling_params=plan.of_session(beginning.session), **plan.where)
    if not isinstance(beginning, Checkout):
        ids = llm.get_tokenizer().encode(beginning) if isinstance(beginning, str) else beginning
        plan.prompt(list(ids))
        (warmed,) = llm.generate([plan.request(None)], plan.warming(), use_tqdm=False)
        if plan.keep:
            plan.parent = checkpoint(llm, warmed.prompt_token_ids, ttl=plan.ttl, **plan.where).session
    else:
        plan.session(beginning)
    names = {}
    try:
        for number in range(plan.n):
            names[name := f"thaw-fork-{next(_numbers)}"] = number
            engine.add_request(name, plan.request(number), plan.sampling(number))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    number = names.pop(output.request_id)
                    kept = error = None
                    if plan.keep:
                        try:
                            about = plan.about(number)
                            kept = checkpoint(llm, output, sampling_params=plan.sampling(number), **about).session
                        except ThawError as found:
                            error = found
                    yield Branch(number, output, plan.parent, kept, error)
    finally:
        if names:  # the caller has left, or something failed
            engine.abort_request([*names])


async def fork_async(
    engine: AsyncLLM,
    beginning: Checkout | CheckpointReport | Sequence[int],
    n: int,
    sampling_params: SamplingParams | None = None,
    *,
    append: Sequence[Sequence[int]] = (),
    keep: bool = False,
    labels: Sequence[str] = (),
    ttl: float | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    model_id: str | None = None,
) -> AsyncIterator[Branch]:
    """``fork`` for an ``AsyncLLM``, beside whatever else it runs; a prompt is token ids."""
    require_awake(engine)
    plan = _Plan(n, append, labels, ttl, sampling_params, keep, store, model_id)
    if isinstance(beginning, str):
        raise UsageError("pass the prompt's token ids, or a session")
    plan.at(beginning)
    if isinstance(beginning, CheckpointReport):
        given = await asyncio.to_thread(plan.of_session, beginning.session)
        beginning = await checkout_async(engine, beginning.session, sampling_params=given, **plan.where)
    if not isinstance(beginning, Checkout):
        plan.prompt(list(beginning))
        await _whole(engine, plan.request(None), plan.warming())
        if keep:
            plan.parent = (await checkpoint_async(engine, list(beginning), ttl=ttl, **plan.where)).session
    else:
        plan.session(beginning)

    async def one(number: int) -> Branch:
        output = await _whole(engine, plan.request(number), plan.sampling(number))
        kept = error = None
        if keep:
            try:
                about = plan.about(number)
                kept = (await checkpoint_async(engine, output, sampling_params=plan.sampling(number), **about)).session
            except ThawError as found:
                error = found
        return Branch(number, output, plan.parent, kept, error)

    tasks = [asyncio.create_task(one(number)) for number in range(n)]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def require_agreement(
    n: int, append: Sequence[Any], labels: Sequence[str], keep: bool, ttl: float | None = None
) -> None:
    """Hold against one another what is said of N continuations.

    Raises:
        UsageError: they do not agree.
    """
    if n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    for what, given in (("append", append), ("labels", labels)):
        if given and len(given) != n:
            raise UsageError(f"{what} has {len(given)} entries for {n} continuations; give one for each, or none")
    expiry(now(), ttl)
    for what, own in (("labels are", labels), ("ttl is", ttl is not None)):
        if own and not keep:
            raise UsageError(f"{what} of sessions that are kept; pass keep=True")


def require_differences(n: int, append: Sequence[Sequence[int]], each: int, temperature: float) -> None:
    """Refuse N continuations that would be the same.

    Args:
        each: ``SamplingParams.n``.

    Raises:
        UsageError: they would.
    """
    if each != 1:
        raise UsageError("sampling_params.n must be 1: n of fork says how many")
    same = len({tuple(ids) for ids in append}) < n if append else n > 1
    if same and temperature == 0:
        raise UsageError("greedy continuations of the same tokens are the same; give a temperature, or append")


def parameters(
    given: SamplingParams | None, append: Sequence[Any], store: Store | str | os.PathLike[str] | None, session: str
) -> SamplingParams | None:
    """Those of branches of a session: given ones; with tokens appended its own, or vLLM's defaults where it has none.

    None: its own, less what it has generated, as ``checkout`` tells them.
    """
    if given is not None or not append:
        return given
    from vllm import SamplingParams

    place = store if isinstance(store, Store) else Store(store)
    own = place.read(place.find(session)).head.sampling
    return SamplingParams() if own is None else sampling.from_json(own)


async def _whole(engine: AsyncLLM, prompt: Any, params: SamplingParams) -> RequestOutput:
    """A request's last answer, which has all of its tokens."""
    found = None
    async for output in engine.generate(prompt, params, f"thaw-fork-{next(_numbers)}"):
        found = output
    assert found is not None
    return found


class _Plan:
    """What is asked for each continuation; made before an engine is asked anything."""

    def __init__(
        self,
        n: int,
        append: Sequence[Sequence[int]],
        labels: Sequence[str],
        ttl: float | None,
        sampling_params: SamplingParams | None,
        keep: bool,
        store: Any,
        model_id: str | None,
    ) -> None:
        require_agreement(n, append, labels, keep, ttl)
        self._append, self._labels, self._params, self.n, self.keep = append, labels, sampling_params, n, keep
        self.ttl = ttl
        self.where: dict[str, Any] = {"store": store, "model_id": model_id}
        self.parent: str | None = None
        self._tokens: list[int] = []
        self._salt: str | None = None

    def at(self, beginning: Any) -> None:
        """Keep and look for sessions where the beginning is kept, unless another place was named."""
        if self.where["store"] is None and isinstance(beginning, (Checkout, CheckpointReport)):
            self.where["store"] = beginning.store

    def of_session(self, session: str) -> SamplingParams | None:
        """Those for going on with a session; None: its own, less what it has generated."""
        self._params = parameters(self._params, self._append, self.where["store"], session)
        return self._params

    def prompt(self, tokens: list[int]) -> None:
        """Begin with these tokens."""
        from vllm import SamplingParams

        self._tokens = tokens
        self._params = self._params or SamplingParams()
        self._require_differences()

    def session(self, there: Checkout) -> None:
        """Begin with a session."""
        self.parent, self._tokens = there.session, there.prompt["prompt_token_ids"]
        self._salt = there.prompt.get("cache_salt")
        self._params = parameters(self._params, self._append, there.store, there.session) or there.sampling_params
        self._require_differences()

    def _require_differences(self) -> None:
        assert self._params is not None
        require_differences(self.n, self._append, self._params.n, self._params.temperature)

    def request(self, number: int | None) -> Any:
        """A prompt of vLLM's; of the beginning alone where ``number`` is None."""
        own = self._append[number] if number is not None and self._append else ()
        prompt: dict[str, Any] = {"prompt_token_ids": [*self._tokens, *own]}
        return prompt if self._salt is None else prompt | {"cache_salt": self._salt}

    def warming(self) -> SamplingParams:
        """Parameters for computing the beginning."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY
        return SamplingParams(max_tokens=1, temperature=0, detokenize=False, output_kind=kind)

    def sampling(self, number: int) -> SamplingParams:
        """A continuation's own."""
        from vllm.sampling_params import RequestOutputKind

        assert self._params is not None
        params = self._params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY  # whole answers are what is kept
        if params.seed is not None:
            params.seed += number
        return params

    def about(self, number: int) -> dict[str, Any]:
        """How a continuation is kept."""
        found: dict[str, Any] = self.where | {"parent": self.parent, "cache_salt": self._salt, "ttl": self.ttl}
        return found | ({"labels": [self._labels[number]]} if self._labels else {})
