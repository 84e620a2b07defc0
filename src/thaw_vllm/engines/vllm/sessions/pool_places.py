"""The engines of a fork pool: each a place with a process in it, a thread that looks after it, and what it is asked."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import BrokenEngineError, ThawError
from .pool_process import CLOSED, POLL, Child, error_of
from .pool_weights import SharedWeights

PROGRAM = "thaw_vllm.engines.vllm.sessions.pool_worker"
STARTS = 3
"""Engines that may fail to start one after the other before a place in the pool is given up."""


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
        weights: that they may have in common.
        zygote: whose forks they are; None: each is started anew.
        logs: where each writes what it prints; None: in ``folder``.
        start_timeout: seconds.
        folder: for sockets; set before the first start.
        closing: nothing is to be begun any more.
        starting: held by whoever starts an engine.
        places: all of them.
    """

    def __init__(
        self,
        asked: dict[str, Any],
        zygote: str | None,
        logs: str | None,
        start_timeout: float,
        at_once: bool,
        share_weights: bool | None,
    ) -> None:
        self.asked, self.zygote, self.logs, self.start_timeout = asked, zygote, logs, start_timeout
        self.folder = Path()
        self.closing = threading.Event()
        self.weights = SharedWeights(asked["snapshot"], asked["engine_args"], share_weights, zygote, self.closing)
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
        self._child = Child("an engine of the fork pool", shared.closing)
        self._state, self._starts = "starting", 0

    def told(self) -> dict[str, Any]:
        """As ``ForkPool.workers`` has it."""
        return {"number": self.number, "pid": self._child.pid, "state": self._state, "starts": self._starts}

    def interrupt(self) -> None:
        """Have the thread see that the pool is closing."""
        self._child.interrupt()

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
                self._child.end()
        self._state = "ended"
        self.begun.set()
        self._shared.refuse_in_vain()

    def _start(self) -> None:
        """Raises:
        ThawError, OSError: it did not start.
        """
        shared = self._shared
        logs = Path(shared.logs or shared.folder)
        until = time.monotonic() + shared.start_timeout
        try:
            asked = shared.weights.asked
            try:
                self._start_with(shared.weights.there(shared.folder, logs, until), logs, until)
            except TimeoutError:
                raise
            except (ThawError, OSError) as error:
                if not asked or not shared.weights.given_up(error):
                    raise
                self._child.end()
                self._start_with(None, logs, until)
        except TimeoutError:
            raise ThawError(f"an engine of the fork pool had not started after {shared.start_timeout:g} s") from None
        self._state = "ready"

    def _start_with(self, weights: dict[str, Any] | None, logs: Path, until: float) -> None:
        shared = self._shared
        self._child.require_open()
        self._starts += 1
        path, log = shared.folder / f"{self.number}-{self._starts}.sock", logs / f"worker-{self.number}.log"
        self._child.start(PROGRAM, path=path, log=log, until=until, zygote=shared.zygote)
        self._child.asked(shared.asked | {"weights": weights}, until)

    def _serve(self) -> None:
        """Do tasks as long as the engine lives and is in time."""
        while not self._shared.closing.is_set() and self._child.pid is not None:
            try:
                task = self._shared.tasks.get(timeout=POLL)
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
        until = time.monotonic() + task.round.timeout
        try:
            self._child.send(task.message, task.round.timeout)
            while (answer := self._child.told(until)) is not None:
                if "branch" in answer:
                    branch = self._branch(answer["branch"])
                    task.numbers.remove(branch.number)
                    task.round.ended.put(branch)
                elif "failed" in answer:
                    task.fail(error_of(answer))
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
            error=None if error is None else error_of(error),
        )


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow one another: the first and how many."""
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], len(found)
