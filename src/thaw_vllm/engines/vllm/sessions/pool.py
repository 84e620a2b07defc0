"""A fork pool: several warm engines, each in a process of its own, that continue one beginning side by side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import BrokenEngineError, ThawError, UsageError, named
from ....format.identity import model_id as checked_model_id
from ....sessions.record import ids
from ....sessions.store import Store
from ....zygote import messages
from ..ending import end_group
from ..fresh import endpoints, last_error, python
from . import sampling
from .forking import require_agreement, require_differences

if TYPE_CHECKING:
    from vllm import SamplingParams

PROGRAM = "thaw_vllm.engines.vllm.sessions.pool_worker"
STARTS = 3
"""Engines that may fail to start one after the other before a place in the pool is given up."""
_POLL = 0.25
"""Seconds in which an idle engine's death is noticed, and that a pool is to end."""


@dataclass(frozen=True)
class PoolBranch:
    """One of several continuations, once it has ended.

    Attributes:
        number: from 0.
        worker: the engine that made it, from 0; None: none did.
        token_ids: the new ones.
        text: of these; empty where the engine has no tokenizer.
        logprobs: of each new token, by token id; None: not asked for.
        finish_reason, stop_reason: vLLM's.
        cached: tokens of the beginning whose keys and values were not computed again.
        parent: the session that it branched off.
        session: under which it is kept itself; None: it is not.
        error: why there is none, or why it could not be kept.
    """

    number: int
    worker: int | None = None
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[dict[int, float], ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cached: int = 0
    parent: str | None = None
    session: str | None = None
    error: ThawError | None = None


@dataclass
class _Round:
    """A fork that is under way: where its branches go as they end."""

    timeout: float
    ended: queue.Queue[PoolBranch | None] = field(default_factory=queue.Queue)
    left: bool = False


@dataclass
class _Task:
    """What one engine is asked: some of a round's branches, by number, or to prefill a prompt."""

    message: dict[str, Any]
    round: _Round
    numbers: list[int]
    parent: str | None = None
    again: bool = False
    found: dict[str, Any] = field(default_factory=dict)


class ForkPool:
    """Engines that are kept warm for forks, as a context manager.

    Each has weights and a cache of its own; a beginning reaches them as a session, which each brings back once. One
    that dies or takes too long is replaced, and its branches are given once more to another, or come with an error.
    An engine of a pool cannot be parked or swapped. Rounds may overlap, from several threads or tasks.

    Attributes:
        store: where sessions are, the beginnings of rounds too.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        snapshot: str | os.PathLike[str] | None = None,
        *,
        workers: int = 2,
        store: str | os.PathLike[str] | None = None,
        model_id: str | None = None,
        timeout: float = 600.0,
        zygote: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        **engine_args: Any,
    ) -> None:
        """Nothing is started before the pool is entered.

        Args:
            model: a model directory.
            snapshot: the ``.thaw`` file that weights are thawed from; None: vLLM loads them.
            workers: engines.
            store: of sessions; None: one in memory that goes with the pool.
            model_id: which weights these are (``thaw id``); needed without a snapshot.
            timeout: seconds that an engine may take for its share of a round.
            zygote: the name of one whose forks they shall be (``thaw zygote start``), which saves them the imports.
            log_dir: where each writes what it prints; None: a directory that goes with the pool.
            engine_args: vLLM's, as of ``vllm.LLM``. On a GPU the engines share its memory evenly where they do not
                say how much each takes; with ``kv_cache_memory_bytes`` they are started at once, else one by one.

        Raises:
            UsageError: numbers out of range, or the weights are not known.
        """
        if workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        if not timeout > 0:
            raise UsageError(f"timeout must be more than 0 seconds, not {timeout}")
        if snapshot is None and model_id is None:
            raise UsageError("sessions have to know whose weights they are of: pass a snapshot, or model_id (thaw id)")
        self._model_id = None if model_id is None else checked_model_id(model_id, "model_id")
        self._timeout, self._zygote = timeout, zygote
        self._asked = {
            "model": os.fspath(model),
            "snapshot": None if snapshot is None else os.fspath(snapshot),
            "engine_args": engine_args,
            "workers": workers,
        }
        self._given_store, self._given_logs = store, log_dir
        self._workers: list[_Worker] = [_Worker(self, number) for number in range(workers)]
        self._tasks: queue.Queue[_Task] = queue.Queue()
        self._closing = threading.Event()
        at_once = "kv_cache_memory_bytes" in engine_args
        self._starting: Any = contextlib.nullcontext() if at_once else threading.Lock()
        self._folder: Path | None = None
        self.store: Store

    def __enter__(self) -> ForkPool:
        """Start the engines.

        Raises:
            ThawError: one did not start; none is left.
        """
        if self._folder is not None:
            raise UsageError("a fork pool is entered once")
        self._folder = Path(tempfile.mkdtemp(prefix="thaw-"))
        try:
            memory = Path("/dev/shm")
            if self._given_store is None:
                own = tempfile.mkdtemp(prefix="thaw-", dir=memory if memory.is_dir() else None)
                self.store = Store(Path(own) / "sessions", create=True)
            else:
                self.store = Store(self._given_store, create=True)
            for worker in self._workers:
                worker.thread.start()
            for worker in self._workers:
                worker.begun.wait()
                if worker.error is not None:
                    raise worker.error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all engines; rounds under way end with errors. Again does nothing."""
        self._closing.set()
        for worker in self._workers:
            worker.interrupt()
        for worker in self._workers:
            if worker.thread.is_alive():
                worker.thread.join()
        self._refuse("the fork pool is closed")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._given_store is None and hasattr(self, "store"):
                shutil.rmtree(self.store.directory.parent, ignore_errors=True)

    def workers(self) -> list[dict[str, Any]]:
        """Of each engine ``number``, ``pid`` (None: it is not running), ``state`` and ``starts``, so far."""
        return [worker.told() for worker in self._workers]

    def fork(
        self,
        beginning: str | Sequence[int],
        n: int,
        sampling_params: SamplingParams | None = None,
        *,
        append: Sequence[Sequence[int]] = (),
        keep: bool = False,
        labels: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Iterator[PoolBranch]:
        """N continuations of one beginning, each as soon as it has ended.

        Args:
            beginning: a session of the pool's store, by id, how that begins, or a label; or a prompt's token ids, which
                one engine computes and keeps for the others.
            n: how many.
            sampling_params, append, keep, labels: as of ``fork``.
            timeout: seconds, in place of the pool's.

        Raises:
            UsageError: numbers that do not agree; all continuations would be the same; there is no such session.
            ThawError: the beginning could not be computed.
        """
        begun = self._begin(beginning, n, sampling_params, append, keep, labels, timeout)
        try:
            for _ in range(n):
                branch = begun.ended.get()
                assert branch is not None
                yield branch
        finally:
            begun.left = True

    async def fork_async(
        self,
        beginning: str | Sequence[int],
        n: int,
        sampling_params: SamplingParams | None = None,
        *,
        append: Sequence[Sequence[int]] = (),
        keep: bool = False,
        labels: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncIterator[PoolBranch]:
        """``fork``, for the event loop of an agent."""
        begun = await asyncio.to_thread(self._begin, beginning, n, sampling_params, append, keep, labels, timeout)
        try:
            for _ in range(n):
                branch = await asyncio.to_thread(begun.ended.get)
                assert branch is not None
                yield branch
        finally:
            begun.left = True
            begun.ended.put(None)  # for a thread that waits for what nobody wants

    def _begin(
        self,
        beginning: str | Sequence[int],
        n: int,
        params: SamplingParams | None,
        append: Sequence[Sequence[int]],
        keep: bool,
        labels: Sequence[str],
        timeout: float | None,
    ) -> _Round:
        if self._folder is None or self._closing.is_set():
            raise UsageError("the fork pool is not running; use it as a context manager")
        require_agreement(n, append, labels, keep)
        begun = _Round(self._timeout if timeout is None else timeout)
        document = sampling.to_json(params)
        if isinstance(beginning, str):
            session = self.store.find(beginning)
        else:
            tokens = ids(beginning).tolist()
            _require_differences({} if document is None else document, n, append)
            session = self._prefill(tokens, begun)
        own = document if document is not None else self.store.read(session).head.sampling or {}
        _require_differences(own, n, append)
        size = -(-n // len(self._workers))
        for first in range(0, n, size):
            count = min(size, n - first)
            self._ask(session, begun, document, first, count, append, keep, labels)
        return begun

    def _prefill(self, tokens: list[int], begun: _Round) -> str:
        task = _Task({"do": "prefill", "tokens": tokens} | self._about(), begun, [0])
        self._put(task)
        answer = begun.ended.get()
        assert answer is not None
        if answer.error is not None:
            raise answer.error
        return str(task.found["session"])

    def _ask(
        self,
        session: str,
        begun: _Round,
        document: dict[str, Any] | None,
        first: int,
        count: int,
        append: Sequence[Sequence[int]],
        keep: bool,
        labels: Sequence[str],
    ) -> None:
        message = {
            "do": "fork",
            "session": session,
            "first": first,
            "count": count,
            "sampling": document,
            "append": [ids(one).tolist() for one in append[first : first + count]],
            "keep": keep,
            "labels": list(labels[first : first + count]),
        }
        self._put(_Task(message | self._about(), begun, [*range(first, first + count)], session))

    def _about(self) -> dict[str, Any]:
        return {"store": os.fspath(self.store.directory), "model_id": self._model_id}

    def _put(self, task: _Task) -> None:
        self._tasks.put(task)
        if self._closing.is_set() or all(worker.error is not None for worker in self._workers):
            self._refuse("no engine of the fork pool is left")

    def _refuse(self, why: str) -> None:
        """Nobody will take what waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                _fail(self._tasks.get_nowait(), BrokenEngineError(why))


class _Worker:
    """A place in the pool: the engine in it, the thread that looks after it, and the next one when it is gone.

    Attributes:
        begun: the first engine has started, or has not.
        error: why there will be none any more.
    """

    def __init__(self, pool: ForkPool, number: int) -> None:
        self._pool, self.number = pool, number
        self.thread = threading.Thread(target=self._run, name=f"thaw-fork-{number}", daemon=True)
        self.begun = threading.Event()
        self.error: ThawError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._state, self._starts = "starting", 0

    def told(self) -> dict[str, Any]:
        process = self._process
        pid = None if process is None or _ended(process) else process.pid
        return {"number": self.number, "pid": pid, "state": self._state, "starts": self._starts}

    def interrupt(self) -> None:
        """Have the thread see that the pool is closing."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        failed = 0
        while not self._pool._closing.is_set():
            try:
                self._state = "starting"
                with self._pool._starting:
                    self._start()
                failed = 0
                self.begun.set()
                self._serve()
            except (ThawError, OSError) as error:
                failed += 1
                if not self.begun.is_set() or failed == STARTS:
                    self.error = error if isinstance(error, ThawError) else ThawError(str(error))
                    break
            finally:
                self._end()
        self._state = "ended"
        self.begun.set()
        if all(worker.error is not None for worker in self._pool._workers):
            self._pool._refuse("no engine of the fork pool is left")

    def _start(self) -> None:
        """Raises:
        ThawError, OSError: it did not start.
        """
        pool = self._pool
        assert pool._folder is not None
        self._starts += 1
        path = pool._folder / f"{self.number}-{self._starts}.sock"
        log = Path(pool._given_logs or pool._folder) / f"worker-{self.number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(os.fspath(path))
            listening.listen(1)
            listening.settimeout(_POLL)
            with log.open("ab") as stream:
                self._process = subprocess.Popen(
                    [*python(pool._zygote), "-m", PROGRAM, os.fspath(path), str(self.number)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | endpoints(os.fspath(pool._folder)),
                    start_new_session=True,  # Ctrl-C is the pool's, which ends them all
                )
            self._connection = self._accepted(listening, log)
        path.unlink()
        self._connection.settimeout(None)
        messages.receive(self._connection)
        messages.send(self._connection, pool._asked)
        answer = messages.receive(self._connection)
        if answer is None:
            raise ThawError(f"an engine of the fork pool ended: {last_error(log.read_text(errors='replace'))}")
        if "failed" in answer[0]:
            raise _error(answer[0])
        self._state = "ready"

    def _accepted(self, listening: socket.socket, log: Path) -> socket.socket:
        assert self._process is not None
        while True:
            with contextlib.suppress(TimeoutError):
                return listening.accept()[0]
            if self._pool._closing.is_set():
                raise ThawError("the fork pool is closing")
            if _ended(self._process):
                raise ThawError(f"an engine of the fork pool ended: {last_error(log.read_text(errors='replace'))}")

    def _serve(self) -> None:
        """Do tasks as long as the engine lives and is in time."""
        assert self._process is not None
        while not self._pool._closing.is_set() and not _ended(self._process):
            try:
                task = self._pool._tasks.get(timeout=_POLL)
            except queue.Empty:
                continue
            if task.round.left:
                continue
            self._state = "busy"
            if not self._does(task):
                return
            self._state = "ready"

    def _does(self, task: _Task) -> bool:
        """Whether the engine may go on afterwards."""
        assert self._connection is not None
        until = time.monotonic() + task.round.timeout
        try:
            messages.send(self._connection, task.message)
            while True:
                self._connection.settimeout(max(0.001, until - time.monotonic()))
                answer = messages.receive(self._connection)
                self._connection.settimeout(None)
                if answer is None:
                    raise ConnectionResetError
                if "branch" in answer[0]:
                    branch = self._branch(answer[0]["branch"])
                    task.numbers.remove(branch.number)
                    task.round.ended.put(branch)
                elif "failed" in answer[0]:
                    _fail(task, _error(answer[0]))
                    return True
                else:
                    task.found |= answer[0]["done"]
                    if task.message["do"] == "prefill":
                        task.round.ended.put(PoolBranch(0, self.number))
                    return True
        except TimeoutError:
            _fail(task, ThawError(f"it was not there within {task.round.timeout:g} s; its engine is replaced"))
        except (OSError, ThawError):
            self._lost(task)
        return False

    def _lost(self, task: _Task) -> None:
        """The engine died in the middle of it: what is missing is somebody else's."""
        if task.again or self._pool._closing.is_set():
            _fail(task, BrokenEngineError("the engines that should have made it have died; the pool's logs say why"))
            return
        for number in task.numbers:
            message = task.message
            if message["do"] == "fork":
                at = number - message["first"]
                own = {name: message[name][at : at + 1] for name in ("append", "labels")}
                message = message | own | {"first": number, "count": 1}
            self._pool._put(_Task(message, task.round, [number], task.parent, again=True, found=task.found))

    def _branch(self, told: dict[str, Any]) -> PoolBranch:
        steps, error = told["logprobs"], told["error"]
        return PoolBranch(
            number=told["number"],
            worker=self.number,
            token_ids=tuple(told["token_ids"]),
            text=told["text"],
            logprobs=None if steps is None else tuple({token: value for token, value in at} for at in steps),
            finish_reason=told["finish_reason"],
            stop_reason=told["stop_reason"],
            cached=told["cached"],
            parent=told["parent"],
            session=told["session"],
            error=None if error is None else _error(error),
        )

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            end_group(self._process)
            self._process = None


def _require_differences(document: dict[str, Any], n: int, append: Sequence[Sequence[int]]) -> None:
    """Of sampling parameters as a record has them."""
    require_differences(n, append, document.get("n", 1), document.get("temperature", 1.0))


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, since ``end_group`` wants to be the one that does."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _fail(task: _Task, error: ThawError) -> None:
    for number in task.numbers:
        task.round.ended.put(PoolBranch(number, parent=task.parent, error=error))


def _error(told: dict[str, Any]) -> ThawError:
    return (named(told["failed"]) or ThawError)(told["message"])
