"""A fork pool: several warm engines, each in a process of its own, that continue one beginning side by side."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import BrokenEngineError, ThawError, UsageError, named
from ....format.identity import model_id as checked_model_id
from ....sessions.collect import collect
from ....sessions.record import checked_labels, ids
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
_LONGEST = 7 * 86400.0
"""Seconds that anything may take."""
_SHORT = 60
"""Bytes that the path of the directory for temporary files may have."""
_ROOM = 1 << 30
"""Bytes of memory that there has to be for a store; containers have 64 MB of it where nothing is said."""


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

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True
        self.ended.put(None)


@dataclass
class _Task:
    """What one engine is asked: some of a round's branches, by number, or to prefill a prompt."""

    message: dict[str, Any]
    round: _Round
    numbers: list[int]
    again: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: ThawError) -> None:
        """What is missing of it comes with an error."""
        for number in self.numbers:
            self.round.ended.put(PoolBranch(number, parent=self.message.get("session"), error=error))
        self.numbers = []


class ForkPool:
    """Engines that are kept warm for forks, as a context manager.

    Each has weights and a cache of its own; a beginning reaches them as a session, which each brings back once. One
    that dies or takes too long is replaced. What one that died was in the middle of is given once more to another;
    what took too long comes with an error. An engine of a pool cannot be parked or swapped. Rounds may overlap, from
    several threads or tasks. A round that its caller leaves is not begun by further engines; those that are in the
    middle of it end their share.

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
        start_timeout: float = 3600.0,
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
            start_timeout: seconds in which an engine has to have started.
            zygote: the name of one whose forks they shall be (``thaw zygote start``), which saves them the imports.
            log_dir: where each writes what it prints; None: a directory that goes with the pool.
            engine_args: vLLM's, as of ``vllm.LLM``, as JSON has them. The engines share the device's memory evenly
                where they do not say how much each takes; with ``kv_cache_memory_bytes`` they are started at once,
                else one by one.

        Raises:
            UsageError: numbers out of range, arguments that JSON cannot hold, or the weights are not known.
        """
        if workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        self._timeout, self._start_timeout = _seconds("timeout", timeout), _seconds("start_timeout", start_timeout)
        if snapshot is None and model_id is None:
            raise UsageError("sessions have to know whose weights they are of: pass a snapshot, or model_id (thaw id)")
        self._model_id = None if model_id is None else checked_model_id(model_id, "model_id")
        self._zygote = zygote
        self._asked = {
            "model": os.path.abspath(model) if os.path.isdir(model) else os.fspath(model),
            "snapshot": None if snapshot is None else os.path.abspath(snapshot),
            "engine_args": engine_args,
            "workers": workers,
        }
        _plain(self._asked, "engine_args")
        self._given_store = None if store is None else os.path.abspath(store)
        self._given_logs = None if log_dir is None else os.path.abspath(log_dir)
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
        if self._folder is not None or self._closing.is_set():
            raise UsageError("a fork pool is entered once")
        self._folder = Path(tempfile.mkdtemp(prefix="thaw-", dir=_short()))
        removed = [self._folder]
        try:
            if self._given_store is None:
                own = Path(tempfile.mkdtemp(prefix="thaw-", dir=_memory()))
                removed.append(own)
                self.store = Store(own / "sessions", create=True)
            else:
                self.store = Store(self._given_store, create=True)
            self._removal = weakref.finalize(self, _remove, removed)  # also where the program ends without closing
            for worker in self._workers:
                worker.thread.start()
            for worker in self._workers:
                worker.begun.wait()
                if worker.error is not None:
                    raise worker.error
        except BaseException:
            self.close()
            _remove(removed)
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
            if worker.thread.is_alive() and worker.thread is not threading.current_thread():
                worker.thread.join()
        self._refuse(_CLOSED)
        if hasattr(self, "_removal"):
            self._removal()

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
        """N continuations of one beginning, each as soon as it has ended; begun when this returns.

        Args:
            beginning: a session of the pool's store, by id, how that begins, or a label; or a prompt's token ids, which
                one engine computes and keeps for the others until the round has ended, with ``keep`` for good.
            n: how many.
            sampling_params, append, keep, labels: as of ``fork``.
            timeout: seconds, in place of the pool's.

        Raises:
            UsageError: numbers that do not agree; all continuations would be the same; there is no such session.
            ThawError: the beginning could not be computed.
        """
        begun = self._round(timeout)
        trunk = self._begin(begun, beginning, n, sampling_params, append, keep, labels)
        return self._branches(begun, n, trunk)

    def _branches(self, begun: _Round, n: int, trunk: str | None) -> Iterator[PoolBranch]:
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
        timeout: float | None = None,
    ) -> AsyncIterator[PoolBranch]:
        """``fork``, for the event loop of an agent."""
        begun, trunk = self._round(timeout), None
        try:
            trunk = await asyncio.to_thread(self._begin, begun, beginning, n, sampling_params, append, keep, labels)
            for _ in range(n):
                branch = await asyncio.to_thread(begun.ended.get)
                assert branch is not None
                yield branch
        finally:
            begun.leave()  # for a thread that waits for what nobody wants
            if trunk is not None:
                await asyncio.to_thread(self._forget, trunk)

    def _round(self, timeout: float | None) -> _Round:
        if self._folder is None or self._closing.is_set():
            raise UsageError("the fork pool is not running; use it as a context manager")
        return _Round(self._timeout if timeout is None else _seconds("timeout", timeout))

    def _begin(
        self,
        begun: _Round,
        beginning: str | Sequence[int],
        n: int,
        params: SamplingParams | None,
        append: Sequence[Sequence[int]],
        keep: bool,
        labels: Sequence[str],
    ) -> str | None:
        """Ask the engines; gives the session that was made for this round alone."""
        require_agreement(n, append, labels, keep)
        document = sampling.to_json(params)
        made = None
        if isinstance(beginning, str):
            session = self.store.find(beginning)
            own = self.store.read(session).head.sampling if document is None else document
            _require_differences(own or {}, n, append)
        else:
            document = {} if document is None else document
            _require_differences(document, n, append)
            session = "0" * 32  # not known yet
        shares = list(_shares(n, len(self._workers)))
        asked = [
            {
                "do": "fork",
                "session": session,
                "first": first,
                "count": count,
                "sampling": document,
                "append": [ids(one).tolist() for one in append[first : first + count]],
                "keep": keep,
                "labels": list(checked_labels(labels[first : first + count])),
            }
            for first, count in shares
        ]
        for message in asked:
            _plain(message, "what is asked")
        if not isinstance(beginning, str):
            session = self._prefill(ids(beginning).tolist(), begun)
            made = None if keep else session
        for message, (first, count) in zip(asked, shares, strict=True):
            message |= {"session": session} | self._about()
            self._put(_Task(message, begun, [*range(first, first + count)]))
        return made

    def _prefill(self, tokens: list[int], begun: _Round) -> str:
        task = _Task({"do": "prefill", "tokens": tokens} | self._about(), begun, [0])
        self._put(task)
        answer = begun.ended.get()
        if answer is None:
            raise ThawError("the round was left")
        if answer.error is not None:
            raise answer.error
        return str(task.found["session"])

    def _forget(self, trunk: str | None) -> None:
        """A beginning that was kept for one round; of a store that is the pool's own its blocks, too."""
        if trunk is None or self._closing.is_set():
            return
        with contextlib.suppress(ThawError):
            with self.store.use():
                self.store.remove(trunk)
            if self._given_store is None:
                collect(self.store)

    def _about(self) -> dict[str, Any]:
        return {"store": os.fspath(self.store.directory), "model_id": self._model_id}

    def _put(self, task: _Task) -> None:
        self._tasks.put(task)
        if self._closing.is_set():
            self._refuse(_CLOSED)
        elif all(worker.error is not None for worker in self._workers):
            self._refuse(_NONE_LEFT)

    def _refuse(self, why: str) -> None:
        """Nobody will take what waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait().fail(BrokenEngineError(why))


_CLOSED = "the fork pool was closed"
_NONE_LEFT = "no engine of the fork pool is left"


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
            except Exception as error:  # whatever it is, others wait for this place
                failed += 1
                if not self.begun.is_set() or failed == STARTS:
                    self.error = (
                        error if isinstance(error, ThawError) else ThawError(f"{type(error).__name__}: {error}")
                    )
                    break
            finally:
                self._state = "starting"
                self._end()
        self._state = "ended"
        self.begun.set()
        if all(worker.error is not None for worker in self._pool._workers):
            self._pool._refuse(_NONE_LEFT)

    def _start(self) -> None:
        """Raises:
        ThawError, OSError: it did not start.
        """
        pool = self._pool
        self._require_open()
        assert pool._folder is not None
        self._starts += 1
        path = pool._folder / f"{self.number}-{self._starts}.sock"
        log = Path(pool._given_logs or pool._folder) / f"worker-{self.number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + pool._start_timeout
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(os.fspath(path))
            listening.listen(1)
            listening.settimeout(_POLL)
            with log.open("ab") as stream:
                printed = stream.tell()
                self._process = subprocess.Popen(
                    [*python(pool._zygote), "-m", PROGRAM, os.fspath(path), str(self.number)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | endpoints(os.fspath(pool._folder)),
                    start_new_session=True,  # Ctrl-C is the pool's, which ends them all
                )
            self._connection = self._accepted(listening, until, log, printed)
        path.unlink()
        self._require_open()  # after which ``interrupt`` finds the connection
        try:
            self._told_by(until)
            messages.send(self._connection, pool._asked)
            answer = self._told_by(until)
        except TimeoutError:
            raise ThawError(f"an engine of the fork pool had not started after {pool._start_timeout:g} s") from None
        if answer is None:
            self._require_open()
            raise ThawError(f"an engine of the fork pool ended: {_last_error(log, printed)}")
        if "failed" in answer:
            found = _error(answer)
            raise found if type(found) is not ThawError else ThawError(_last_error(log, printed) or str(found))
        self._state = "ready"

    def _told_by(self, until: float) -> dict[str, Any] | None:
        """The engine's next message.

        Raises:
            TimeoutError: it was not there in time.
        """
        assert self._connection is not None
        self._connection.settimeout(max(0.001, until - time.monotonic()))
        found = messages.receive(self._connection)
        return None if found is None else found[0]

    def _require_open(self) -> None:
        if self._pool._closing.is_set():
            raise BrokenEngineError(_CLOSED)

    def _accepted(self, listening: socket.socket, until: float, log: Path, printed: int) -> socket.socket:
        assert self._process is not None
        while True:
            with contextlib.suppress(TimeoutError):
                return listening.accept()[0]
            self._require_open()
            if _ended(self._process):
                raise ThawError(f"an engine of the fork pool ended: {_last_error(log, printed)}")
            if time.monotonic() > until:
                raise ThawError(f"an engine of the fork pool had not started after {self._pool._start_timeout:g} s")

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
            try:
                if not self._does(task):
                    return
            finally:
                task.fail(ThawError("what looks after the engine failed"))  # nothing, where nothing is missing
            self._state = "ready"

    def _does(self, task: _Task) -> bool:
        """Whether the engine may go on afterwards."""
        assert self._connection is not None
        until = time.monotonic() + task.round.timeout
        try:
            self._connection.settimeout(max(0.001, task.round.timeout))
            messages.send(self._connection, task.message)
            while (answer := self._told_by(until)) is not None:
                if "branch" in answer:
                    branch = self._branch(answer["branch"])
                    task.numbers.remove(branch.number)
                    task.round.ended.put(branch)
                elif "failed" in answer:
                    task.fail(_error(answer))
                    return True
                else:
                    task.found |= answer["done"]
                    if task.message["do"] == "prefill":
                        task.numbers = []
                        task.round.ended.put(PoolBranch(0, self.number))
                    return True
            self._lost(task)
        except TimeoutError:
            task.fail(ThawError(f"it was not there within {task.round.timeout:g} s; its engine is replaced"))
        except OSError:
            self._lost(task)
        except ThawError as error:  # what it says is no message, or too much
            task.fail(error)
        return False

    def _lost(self, task: _Task) -> None:
        """The engine died in the middle of it: what is missing is somebody else's."""
        if self._pool._closing.is_set():
            task.fail(BrokenEngineError(_CLOSED))
        elif task.again:
            task.fail(BrokenEngineError("the engines that should have made it have died; their logs say why"))
        numbers, task.numbers = task.numbers, []
        for first, count in _runs(numbers):
            message = task.message
            if message["do"] == "fork":
                at = first - message["first"]
                own = {name: message[name][at : at + count] for name in ("append", "labels")}
                message = message | own | {"first": first, "count": count}
            again = _Task(message, task.round, [*range(first, first + count)], again=True, found=task.found)
            self._pool._put(again)

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
            with contextlib.suppress(ProcessLookupError):  # reaped by somebody else
                end_group(self._process)
            self._process = None


def _shares(n: int, workers: int) -> Iterator[tuple[int, int]]:
    """First number and count of each engine's share."""
    size, more = divmod(n, workers)
    first = 0
    for worker in range(min(n, workers)):
        count = size + (worker < more)
        yield first, count
        first += count


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow one another: the first and how many."""
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], len(found)


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


def _remove(directories: Sequence[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _last_error(log: Path, since: int) -> str:
    """Of what an engine printed from there on."""
    with log.open("rb") as stream:
        stream.seek(since)
        return last_error(stream.read().decode(errors="replace"))


def _require_differences(document: dict[str, Any], n: int, append: Sequence[Sequence[int]]) -> None:
    """Of sampling parameters as a record has them."""
    require_differences(n, append, document.get("n", 1), document.get("temperature", 1.0))


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, since ``end_group`` wants to be the one that does."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _error(told: dict[str, Any]) -> ThawError:
    return (named(told["failed"]) or ThawError)(told["message"])
