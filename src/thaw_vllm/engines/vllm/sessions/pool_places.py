"""The engines of a fork pool: each a place with a process in it, a thread that looks after it, and what it is asked."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import BrokenEngineError, ThawError, named
from ....zygote import messages
from ..ending import end_group
from ..fresh import endpoints, last_error, python

PROGRAM = "thaw_vllm.engines.vllm.sessions.pool_worker"
STARTS = 3
"""Engines that may fail to start one after the other before a place in the pool is given up."""
_POLL = 0.25
"""Seconds in which an idle engine's death is noticed, and that a pool is to end."""
CLOSED = "the fork pool was closed"


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
class Round:
    """A fork that is under way: where its branches go as they end."""

    timeout: float
    ended: queue.Queue[PoolBranch | None] = field(default_factory=queue.Queue)
    left: bool = False

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True
        self.ended.put(None)


@dataclass
class Task:
    """What one engine is asked: some of a round's branches, by number, or to prefill a prompt."""

    message: dict[str, Any]
    round: Round
    numbers: list[int]
    again: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: ThawError) -> None:
        """What is missing of it comes with an error."""
        for number in self.numbers:
            self.round.ended.put(PoolBranch(number, parent=self.message.get("session"), error=error))
        self.numbers = []


class Shared:
    """What the places of a pool have in common.

    Attributes:
        asked: of each engine: model, snapshot, arguments, and how many there are.
        zygote: whose forks they are; None: each is started anew.
        logs: where each writes what it prints; None: in ``folder``.
        start_timeout: seconds.
        folder: for sockets; set before the first start.
        closing: nothing is to be begun any more.
        starting: held by whoever starts an engine.
        places: all of them.
    """

    def __init__(
        self, asked: dict[str, Any], zygote: str | None, logs: str | None, start_timeout: float, at_once: bool
    ) -> None:
        self.asked, self.zygote, self.logs, self.start_timeout = asked, zygote, logs, start_timeout
        self.folder = Path()
        self.closing = threading.Event()
        self.starting: Any = contextlib.nullcontext() if at_once else threading.Lock()
        self.places = [Place(self, number) for number in range(asked["workers"])]
        self.tasks: queue.Queue[Task] = queue.Queue()

    def put(self, task: Task) -> None:
        """Have some engine do it; where there will be none, it fails."""
        self.tasks.put(task)
        self.refuse_in_vain()

    def refuse_in_vain(self) -> None:
        """Where nobody will take what waits, it fails."""
        if self.closing.is_set():
            why = CLOSED
        elif all(place.error is not None for place in self.places):
            why = "no engine of the fork pool is left"
        else:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self.tasks.get_nowait().fail(BrokenEngineError(why))


class Place:
    """A place in the pool: the engine in it, the thread that looks after it, and the next one when it is gone.

    Attributes:
        begun: the first engine has started, or has not.
        error: why there will be none any more.
    """

    def __init__(self, shared: Shared, number: int) -> None:
        self._shared, self.number = shared, number
        self.thread = threading.Thread(target=self._run, name=f"thaw-fork-{number}", daemon=True)
        self.begun = threading.Event()
        self.error: ThawError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._state, self._starts = "starting", 0

    def told(self) -> dict[str, Any]:
        """As ``ForkPool.workers`` has it."""
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
        while not self._shared.closing.is_set():
            try:
                self._state = "starting"
                with self._shared.starting:
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
        self._shared.refuse_in_vain()

    def _start(self) -> None:
        """Raises:
        ThawError, OSError: it did not start.
        """
        shared = self._shared
        self._require_open()
        self._starts += 1
        path = shared.folder / f"{self.number}-{self._starts}.sock"
        log = Path(shared.logs or shared.folder) / f"worker-{self.number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + shared.start_timeout
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(os.fspath(path))
            listening.listen(1)
            listening.settimeout(_POLL)
            with log.open("ab") as stream:
                printed = stream.tell()
                self._process = subprocess.Popen(
                    [*python(shared.zygote), "-m", PROGRAM, os.fspath(path), str(self.number)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | endpoints(os.fspath(shared.folder)),
                    start_new_session=True,  # Ctrl-C is the pool's, which ends them all
                )
            self._connection = self._accepted(listening, until, log, printed)
        path.unlink()
        self._require_open()  # after which ``interrupt`` finds the connection
        try:
            self._told_by(until)
            messages.send(self._connection, shared.asked)
            answer = self._told_by(until)
        except TimeoutError:
            raise ThawError(f"an engine of the fork pool had not started after {shared.start_timeout:g} s") from None
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
        if self._shared.closing.is_set():
            raise BrokenEngineError(CLOSED)

    def _accepted(self, listening: socket.socket, until: float, log: Path, printed: int) -> socket.socket:
        assert self._process is not None
        while True:
            with contextlib.suppress(TimeoutError):
                return listening.accept()[0]
            self._require_open()
            if _ended(self._process):
                raise ThawError(f"an engine of the fork pool ended: {_last_error(log, printed)}")
            if time.monotonic() > until:
                raise ThawError(f"an engine of the fork pool had not started after {self._shared.start_timeout:g} s")

    def _serve(self) -> None:
        """Do tasks as long as the engine lives and is in time."""
        assert self._process is not None
        while not self._shared.closing.is_set() and not _ended(self._process):
            try:
                task = self._shared.tasks.get(timeout=_POLL)
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

    def _does(self, task: Task) -> bool:
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

    def _lost(self, task: Task) -> None:
        """The engine died in the middle of it: what is missing is somebody else's."""
        if self._shared.closing.is_set():
            task.fail(BrokenEngineError(CLOSED))
        elif task.again:
            task.fail(BrokenEngineError("the engines that should have made it have died; their logs say why"))
        numbers, task.numbers = task.numbers, []
        for first, count in _runs(numbers):
            message = task.message
            if message["do"] == "fork":
                at = first - message["first"]
                own = {name: message[name][at : at + count] for name in ("append", "labels")}
                message = message | own | {"first": first, "count": count}
            again = Task(message, task.round, [*range(first, first + count)], again=True, found=task.found)
            self._shared.put(again)

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


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow one another: the first and how many."""
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], len(found)


def _last_error(log: Path, since: int) -> str:
    """Of what an engine printed from there on."""
    with log.open("rb") as stream:
        stream.seek(since)
        return last_error(stream.read().decode(errors="replace"))


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, since ``end_group`` wants to be the one that does."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _error(told: dict[str, Any]) -> ThawError:
    return (named(told["failed"]) or ThawError)(told["message"])
