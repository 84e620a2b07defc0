"""A fork pool: several warm engines, each in a process of its own, that continue one beginning side by side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import ThawError, UsageError
from ....format.identity import model_id as checked_model_id
from ....sessions.collect import collect
from ....sessions.record import checked_labels, ids
from ....sessions.store import Store
from . import sampling
from .forking import require_agreement, require_differences
from .pool_places import PoolBranch, Round, Shared, Task

if TYPE_CHECKING:
    from vllm import SamplingParams

_LONGEST = 7 * 86400.0
"""Seconds that anything may take."""
_SHORT = 60
"""Bytes that the path of the directory for temporary files may have."""
_ROOM = 1 << 30
"""Bytes of memory that there has to be for a store; containers have 64 MB of it where nothing is said."""


class ForkPool:
    """Engines that are kept warm for forks, as a context manager.

    Each has a cache of its own; on a GPU they have one copy of the weights in common, which a process of its own
    holds. A beginning reaches them as a session, which each brings back once. One that dies or takes too long is
    replaced. What one that died was in the middle of is given once more to another; what took too long comes with an
    error. An engine of a pool cannot be parked or swapped. Rounds may overlap, from several threads or tasks. A round
    that its caller leaves is not begun by further engines; those that are in the middle of it end their share.

    Attributes:
        store: where sessions are, the beginnings of rounds too.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        snapshot: str | os.PathLike[str] | None = None,
        *,
        workers: int = 2,
        batch: int = 8,
        store: str | os.PathLike[str] | None = None,
        model_id: str | None = None,
        timeout: float = 600.0,
        start_timeout: float = 3600.0,
        zygote: str | None = None,
        share_weights: bool | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        **engine_args: Any,
    ) -> None:
        """Nothing is started before the pool is entered.

        Args:
            model: a model directory.
            snapshot: the ``.thaw`` file that weights are thawed from; None: vLLM loads them.
            workers: engines.
            batch: a round is shared among as many engines as it takes for each to have so many continuations at most,
                evenly, or among all. Each step of an engine reads all of the weights, whatever the number of its
                requests, and engines on one GPU take turns.
            store: of sessions; None: one in memory that goes with the pool.
            model_id: which weights these are (``thaw id``); needed without a snapshot.
            timeout: seconds that an engine may take for its share of a round; branches that it has sent by then count,
                later ones do not.
            start_timeout: seconds in which an engine has to have started.
            zygote: the name of one whose forks they shall be (``thaw zygote start``), which saves them the imports.
            share_weights: whether there is one copy of the weights in the GPU's memory; None: where there can be: with
                a snapshot, engines of one rank, an NVIDIA GPU, and a model whose weights stay as they are loaded
                (unquantised linear layers, for one). Where not, each engine has its own.
            log_dir: where each writes what it prints; None: a directory that goes with the pool.
            engine_args: vLLM's, as of ``vllm.LLM``, as JSON has them. The engines share the device's memory evenly
                where they do not say how much each takes; with ``kv_cache_memory_bytes`` they are started at once,
                else one by one.

        Raises:
            UsageError: numbers out of range, arguments that JSON cannot hold, the weights are not known, or they are
                to be shared and cannot be.
        """
        if workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        if batch < 1:
            raise UsageError(f"batch must be at least 1, not {batch}")
        self._batch = batch
        self._timeout, start_timeout = _seconds("timeout", timeout), _seconds("start_timeout", start_timeout)
        if snapshot is None and model_id is None:
            raise UsageError("sessions have to know whose weights they are of: pass a snapshot, or model_id (thaw id)")
        self._model_id = None if model_id is None else checked_model_id(model_id, "model_id")
        asked = {
            "model": os.path.abspath(model) if os.path.isdir(model) else os.fspath(model),
            "snapshot": None if snapshot is None else os.path.abspath(snapshot),
            "engine_args": engine_args,
            "workers": workers,
        }
        _plain(asked, "engine_args")
        self._given = None if store is None else os.path.abspath(store)
        logs = None if log_dir is None else os.path.abspath(log_dir)
        at_once = "kv_cache_memory_bytes" in engine_args
        self._shared = Shared(asked, zygote, logs, start_timeout, at_once, share_weights)
        self._entered = False
        self._removed: list[Path] = []
        self._end = weakref.finalize(self, _end, self._shared, self._removed)  # also where nobody closes it
        self.store: Store

    def __enter__(self) -> ForkPool:
        """Start the engines.

        Raises:
            ThawError: one did not start; none is left.
        """
        shared = self._shared
        if self._entered or shared.closing.is_set():
            raise UsageError("a fork pool is entered once")
        self._entered = True
        try:
            self._removed.append(Path(tempfile.mkdtemp(prefix="thaw-", dir=_short())))
            shared.folder = self._removed[0]
            if self._given is None:
                self._removed.append(Path(tempfile.mkdtemp(prefix="thaw-", dir=_memory())))
                self.store = Store(self._removed[1] / "sessions", create=True)
            else:
                self.store = Store(self._given, create=True)
            for place in shared.places:
                place.thread.start()
            for place in shared.places:
                place.begun.wait()
                if place.error is not None:
                    raise place.error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all engines; rounds under way end with errors. Again does nothing."""
        self._end()

    def workers(self) -> list[dict[str, Any]]:
        """Of each engine ``number``, ``pid`` (None: it is not running), ``state`` and ``starts``, so far."""
        return [place.told() for place in self._shared.places]

    @property
    def weights_pid(self) -> int | None:
        """The process that holds the one copy of the weights; None: each engine has its own, or none runs."""
        return self._shared.weights.pid

    def fork(
        self,
        beginning: str | Sequence[int],
        n: int,
        sampling_params: SamplingParams | None = None,
        *,
        append: Sequence[Sequence[int]] = (),
        keep: bool = False,
        labels: Sequence[str] = (),
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[PoolBranch]:
        """N continuations of one beginning, each as soon as it has ended; begun when this returns.

        Args:
            beginning: a session of the pool's store, by id, how that begins, or a label; or a prompt's token ids, which
                one engine computes and keeps for the others until the round has ended, with ``keep`` for good.
            n: how many.
            sampling_params, append, keep, labels, ttl: as of ``fork``.
            timeout: seconds, in place of the pool's.

        Raises:
            UsageError: numbers that do not agree; all continuations would be the same; there is no such session.
            ThawError: the beginning could not be computed.
        """
        begun = self._round(timeout)
        trunk = self._begin(begun, beginning, n, sampling_params, append, keep, labels, ttl)
        return self._branches(begun, n, trunk)

    def _branches(self, begun: Round, n: int, trunk: str | None) -> Iterator[PoolBranch]:
        try:
            for _ in range(n):
                branch = begun.ended.get()
                assert branch is not None
                yield branch
        finally:
            begun.leave()
            self._forget(trunk)

    async def fork_async(
        self,
        beginning: str | Sequence[int],
        n: int,
        sampling_params: SamplingParams | None = None,
        *,
        append: Sequence[Sequence[int]] = (),
        keep: bool = False,
        labels: Sequence[str] = (),
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[PoolBranch]:
        """``fork``, for the event loop of an agent."""
        begun, trunk = self._round(timeout), None
        try:
            given = (begun, beginning, n, sampling_params, append, keep, labels, ttl)
            trunk = await asyncio.to_thread(self._begin, *given)
            for _ in range(n):
                branch = await asyncio.to_thread(begun.ended.get)
                assert branch is not None
                yield branch
        finally:
            begun.leave()  # for a thread that waits for what nobody wants
            if trunk is not None:
                await asyncio.to_thread(self._forget, trunk)

    def _round(self, timeout: float | None) -> Round:
        if not self._entered or self._shared.closing.is_set():
            raise UsageError("the fork pool is not running; use it as a context manager")
        return Round(self._timeout if timeout is None else _seconds("timeout", timeout))

    def _begin(
        self,
        begun: Round,
        beginning: str | Sequence[int],
        n: int,
        params: SamplingParams | None,
        append: Sequence[Sequence[int]],
        keep: bool,
        labels: Sequence[str],
        ttl: float | None,
    ) -> str | None:
        """Ask the engines; gives the session that was made for this round alone."""
        require_agreement(n, append, labels, keep, ttl)
        document = sampling.to_json(params)
        session = tokens = made = None
        if isinstance(beginning, str):
            session = self.store.find(beginning)
            own = self.store.read(session).head.sampling if document is None else document
            _require_differences(own or {}, n, append)
        else:
            tokens, document = ids(beginning).tolist(), document or {}
            _require_differences(document, n, append)
        shares = list(_shares(n, min(len(self._shared.places), -(-n // self._batch))))
        asked = [
            {
                "do": "fork",
                "first": first,
                "count": count,
                "sampling": document,
                "append": [ids(one).tolist() for one in append[first : first + count]],
                "keep": keep,
                "labels": list(checked_labels(labels[first : first + count])),
                "ttl": ttl,
            }
            for first, count in shares
        ]
        for message in asked:
            _plain(message, "what is asked")
        if tokens is not None:
            session = self._prefill(tokens, begun, ttl)
            made = None if keep else session
        for message, (first, count) in zip(asked, shares, strict=True):
            message |= {"session": session} | self._about()
            self._shared.put(Task(message, begun, [*range(first, first + count)]))
        return made

    def _prefill(self, tokens: list[int], begun: Round, ttl: float | None) -> str:
        task = Task({"do": "prefill", "tokens": tokens, "ttl": ttl} | self._about(), begun, [0])
        self._shared.put(task)
        answer = begun.ended.get()
        if answer is None:
            raise ThawError("the round was left")
        if answer.error is not None:
            raise answer.error
        return str(task.found["session"])

    def _forget(self, trunk: str | None) -> None:
        """A beginning that was kept for one round; of a store that is the pool's own its blocks, too."""
        if trunk is None or self._shared.closing.is_set():
            return
        with contextlib.suppress(ThawError):
            with self.store.use():
                self.store.forget([trunk])  # unless somebody has pinned it
            if self._given is None:
                collect(self.store, expire=False)

    def _about(self) -> dict[str, Any]:
        return {"store": os.fspath(self.store.directory), "model_id": self._model_id}


def _shares(n: int, workers: int) -> Iterator[tuple[int, int]]:
    """First number and count of each engine's share; of at least one engine, and of no more than ``n``."""
    size, more = divmod(n, workers)
    first = 0
    for worker in range(workers):
        count = size + (worker < more)
        yield first, count
        first += count


def _seconds(name: str, value: float) -> float:
    if not 0 < value <= _LONGEST:
        raise UsageError(f"{name} must be more than 0 seconds and at most {_LONGEST}, not {value}")
    return value


def _plain(value: Any, what: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} must be plain values, as JSON has them: {error}") from None


def _short() -> str | None:
    """A place for sockets, whose paths have 107 bytes at most; None: the usual one."""
    return None if len(os.fsencode(tempfile.gettempdir())) <= _SHORT else "/tmp"


def _memory() -> Path | None:
    """A place in memory for a pool's own store; None: the usual one for temporary files."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).total >= _ROOM else None


def _end(shared: Shared, removed: Sequence[Path]) -> None:
    """End all engines, and what waits for them; then what a pool has of its own goes."""
    shared.closing.set()
    if threading.current_thread() in [place.thread for place in shared.places]:  # nobody closed it; it was collected
        threading.Thread(target=_end, args=(shared, removed), name="thaw-fork-end").start()
        return
    shared.weights.interrupt()
    for place in shared.places:
        place.interrupt()
    for place in shared.places:
        if place.thread.is_alive():
            place.thread.join()
    shared.weights.end()
    shared.refuse_in_vain()
    for directory in removed:
        shutil.rmtree(directory, ignore_errors=True)


def _require_differences(document: dict[str, Any], n: int, append: Sequence[Sequence[int]]) -> None:
    """Of sampling parameters as a record has them."""
    require_differences(n, append, document.get("n", 1), document.get("temperature", 1.0))
