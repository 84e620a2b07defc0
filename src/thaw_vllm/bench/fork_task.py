"""The child's side of ``thaw bench fork``: an engine that forks and keeps a trunk, and a fresh one that takes it up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ThawError, UsageError
from .gpu_memory import gpu_mib
from .kv_pages import difference
from .kv_task import file_of, import_vllm, need_room, prompt, started

if TYPE_CHECKING:
    from vllm import SamplingParams

    from ..engines.vllm.prompted import Prompted
    from ..engines.vllm.sessions.pool import ForkPool
    from ..engines.vllm.sessions.pool_places import PoolBranch
    from .child import Steps

LABEL = "trunk"
"""Of the session that is kept, in a store of its own for each length."""
POOL_BRANCHES, POOL_TOKENS = 4, 64
"""Of a round of a fork pool: continuations, and tokens of each."""
SEED = 1
"""Of the first continuation; the others' are the numbers after it."""


def keeping(request: dict[str, Any]) -> Steps:
    """The request of ``kv_task.freezing``, and ``branches``: continuations of each trunk.

    The answer has ``lengths``, for each of ``tokens``: every run of the ``prefills``, of the ``prefix`` and of the
    ``fork`` (``seconds`` until the last first token, the ``tokens``, how many of each prompt were ``cached``), seconds
    of every ``checkpoint`` and their ``reports``, and how many tokens of such a prompt are found ``cached``.
    """
    import_vllm(request["sockets"])
    yield
    with started(request) as engine:
        forks = _Forks(engine, request)
        forks.warm(forks.prefills, forks.prefix, forks.fork)
        yield
        lengths: list[dict[str, Any]] = []
        for tokens in request["tokens"]:
            lengths.append(_kept(engine, forks, tokens, request))
            if len(lengths) == 1:
                need_room(lengths[0]["reports"][-1]["bytes"] / tokens, request, copies=2)
        yield
    return {"lengths": lengths}


def thawing(request: dict[str, Any]) -> Steps:
    """The same request, once ``keeping`` left its sessions in ``folder``.

    The answer has ``lengths``: seconds of every ``restore`` and their ``reports``, every run of the ``fork`` of what
    was restored, as above, and how the pages differ that this engine froze of it (``different``).
    """
    import_vllm(request["sockets"])
    yield
    with started(request, thaws=True) as engine:
        forks = _Forks(engine, request)
        forks.warm(forks.fork)
        yield
        lengths = [_thawed(engine, forks, tokens, request) for tokens in request["tokens"]]
        yield
    return {"lengths": lengths}


def pooled(request: dict[str, Any]) -> Steps:
    """The same request, with ``snapshot`` and ``workers``: rounds of a fork pool whose engines share its weights.

    The answer has ``lengths``: seconds of every ``round``, once each engine has brought the trunk back; of the
    ``first`` one, in which the first of them do; and the ``tokens`` of each round's continuations; how many MiB of the
    GPU's memory the pool took (``mib``; None where nobody tells); and whether the weights are ``shared``.
    """
    from ..engines.vllm.sessions.pool import ForkPool

    import_vllm(request["sockets"])
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1, seed=SEED, max_tokens=POOL_TOKENS, ignore_eos=True, detokenize=False)
    before = gpu_mib()
    yield
    with ForkPool(request["model"], request["snapshot"], workers=request["workers"], **request["engine_args"]) as pool:
        _everywhere(pool, prompt(max(request["tokens"]), request["vocabulary"], "warm"), sampling)
        yield
        lengths = []
        for tokens in request["tokens"]:
            trunk = _trunk(pool, prompt(tokens, request["vocabulary"]), sampling)
            first = _everywhere(pool, trunk, sampling)
            rounds, made = [], []
            for _ in range(request["runs"]):
                start = time.perf_counter()
                made.append([list(branch.token_ids) for branch in _made(pool.fork(trunk, POOL_BRANCHES, sampling))])
                rounds.append(time.perf_counter() - start)
            lengths.append({"first": first, "round": rounds, "tokens": made})
        after = gpu_mib()
        shared = pool.weights_pid is not None
        yield
    return {"lengths": lengths, "shared": shared, "mib": None if before is None or after is None else after - before}


def _trunk(pool: ForkPool, ids: list[int], sampling: SamplingParams) -> str:
    """A session of the pool's store."""
    (branch,) = pool.fork(ids, 1, sampling, keep=True)
    if branch.error is not None or branch.parent is None:
        raise branch.error or ThawError("the trunk was not kept")
    return branch.parent


def _everywhere(pool: ForkPool, beginning: Any, sampling: SamplingParams) -> float:
    """Rounds of it until every engine has had a share; seconds of the first."""
    there: set[int | None] = set()
    seconds = []
    while len(there) < len(pool.workers()):
        start = time.perf_counter()
        there |= {branch.worker for branch in _made(pool.fork(beginning, POOL_BRANCHES, sampling))}
        seconds.append(time.perf_counter() - start)
    return seconds[0]


def _made(branches: Iterator[PoolBranch]) -> list[PoolBranch]:
    """A round's continuations, in order."""
    found = sorted(branches, key=lambda branch: branch.number)
    for branch in found:
        if branch.error is not None:
            raise branch.error
    return found


TASKS = {"fork-keep": keeping, "fork-thaw": thawing, "fork-pool": pooled}


class _Forks:
    """Several requests for one token each, of one trunk in one engine; a run is what ``keeping`` tells of it."""

    def __init__(self, engine: Prompted, request: dict[str, Any]) -> None:
        self._engine, self._n = engine, request["branches"]
        self._warm = prompt(max(request["tokens"]), request["vocabulary"], "warm")

    def warm(self, *works: Callable[[list[int]], Any]) -> None:
        """Each once, uncounted, with other tokens of the longest length."""
        for work in works:
            self._engine.forget()
            work(self._warm)

    def prefills(self, ids: list[int]) -> dict[str, Any]:
        """Each computes the trunk: their salts keep them from sharing blocks."""
        return self._at_once([{"prompt_token_ids": ids, "cache_salt": str(number)} for number in range(self._n)])

    def prefix(self, ids: list[int]) -> dict[str, Any]:
        """They share what vLLM's prefix cache lets them share."""
        return self._at_once([{"prompt_token_ids": ids} for _ in range(self._n)])

    def fork(self, beginning: Any) -> dict[str, Any]:
        """By ``thaw_vllm.fork``, of token ids or of a checkout."""
        from ..engines.vllm.sessions.forking import fork

        start = time.perf_counter()
        branches = list(fork(self._engine.llm, beginning, self._n, self.sampling()))
        seconds = time.perf_counter() - start
        return _run(seconds, [branch.output for branch in sorted(branches, key=lambda branch: branch.number)])

    @staticmethod
    def sampling(number: int = 0) -> Any:
        """A continuation's parameters, as ``fork`` makes them of the first one's."""
        from vllm import SamplingParams

        return SamplingParams(temperature=1, seed=SEED + number, max_tokens=1, ignore_eos=True, detokenize=False)

    def _at_once(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        return _run(*self._engine.at_once(prompts, [self.sampling(number) for number in range(self._n)]))


def _run(seconds: float, outputs: list[Any]) -> dict[str, Any]:
    tokens = [int(output.outputs[0].token_ids[0]) for output in outputs]
    return {"seconds": seconds, "tokens": tokens, "cached": [int(output.num_cached_tokens or 0) for output in outputs]}


def _kept(engine: Prompted, forks: _Forks, tokens: int, request: dict[str, Any]) -> dict[str, Any]:
    from ..engines.vllm.kv.api import freeze_kv_cache
    from ..engines.vllm.sessions.api import checkpoint

    ids, store, model = prompt(tokens, request["vocabulary"]), _store(request, tokens), request["model_id"]
    runs: dict[str, list[dict[str, Any]]] = {"prefills": [], "prefix": [], "fork": []}
    seconds, reports = [], []
    _need_cache(engine, tokens, request)
    works = [("prefills", forks.prefills), ("prefix", forks.prefix), ("fork", forks.fork)]
    for number in range(request["runs"]):
        turn = number % len(works)  # each is first, and last, as often as the others
        for name, work in works[turn:] + works[:turn]:
            engine.forget()
            runs[name].append(work(ids))
        shared = max(runs["prefills"][-1]["cached"])
        if shared:
            raise ThawError(f"of {tokens} tokens {shared} were cached for a request that was to share nothing")
        engine.first_token(ids)  # where requests that shared nothing came last
        shutil.rmtree(store, ignore_errors=True)  # blocks that are there already would not be written
        start = time.perf_counter()
        report = checkpoint(engine.llm, ids, labels=[LABEL], store=store, model_id=model)
        seconds.append(time.perf_counter() - start)
        reports.append(asdict(report))
    freeze_kv_cache(engine.llm, file_of(request, tokens), token_ids=ids, model_id=model)
    _, cached = engine.first_token(ids)
    if not cached or not reports[-1]["blocks"]:
        raise UsageError(
            f"of {tokens} tokens none were cached; give more --tokens (a block may be longer), and leave prefix "
            "caching on"
        )
    return {**runs, "checkpoint": seconds, "reports": reports, "cached": cached}


def _need_cache(engine: Prompted, tokens: int, request: dict[str, Any]) -> None:
    """Requests that share nothing would wait for one another where the cache does not hold them all.

    Raises:
        UsageError: it does not.
    """
    from ..engines.vllm.kv.api import kv_cache_info

    found, branches = kv_cache_info(engine.llm, model_id=request["model_id"]), request["branches"]
    size = found["block_size"]
    room = (found["blocks"] - 1) // (-(-(tokens + 1) // size)) if found["blocks"] > 1 else 0
    if room < branches:
        raise UsageError(
            f"the cache holds {room} prompts of {tokens} tokens that share nothing, not {branches}; give it more with "
            "--engine-arg kv_cache_memory_bytes=N, or give fewer --branches or --tokens"
        )


def _thawed(engine: Prompted, forks: _Forks, tokens: int, request: dict[str, Any]) -> dict[str, Any]:
    from ..engines.vllm.kv.api import freeze_kv_cache
    from ..engines.vllm.sessions.api import checkout

    ids, path, model = prompt(tokens, request["vocabulary"]), file_of(request, tokens), request["model_id"]
    about: dict[str, Any] = {
        "session": LABEL,
        "sampling_params": forks.sampling(),
        "store": _store(request, tokens),
        "model_id": model,
    }
    seconds, reports, runs = [], [], []
    for _ in range(request["runs"]):
        engine.forget()
        start = time.perf_counter()
        there = checkout(engine.llm, **about)
        seconds.append(time.perf_counter() - start)
        reports.append({name: getattr(there, name) for name in _REPORTED})
        runs.append(forks.fork(there))
    # Before a request computes the last block once more, whose roundings may be others.
    engine.forget()
    checkout(engine.llm, **about)
    again = freeze_kv_cache(engine.llm, path.with_name("again.thawkv"), token_ids=ids, model_id=model)
    different = difference(path, Path(again.path))
    for file in again.files:
        Path(file).unlink(missing_ok=True)
    return {"restore": seconds, "reports": reports, "fork": runs, "different": different}


_REPORTED = ("blocks", "present", "left_out", "lost", "bytes", "seconds", "phases")
"""Of a checkout, in JSON's types."""


def _store(request: dict[str, Any], tokens: int) -> Path:
    return Path(request["folder"]) / f"sessions-{tokens}"
