"""The child's side of ``thaw bench swap``: one engine that takes two snapshots' weights in turn, and is parked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from .gpu_memory import gpu_mib
from .kv_task import import_vllm, prompt

if TYPE_CHECKING:
    from ..engines.vllm.prompted import Prompted
    from .child import Steps

PROMPT, ANSWER = 60, 16
"""Tokens of the prompt that is asked after each swap, and of the answers that are compared."""


def swapping(request: dict[str, Any]) -> Steps:
    """``model``, ``snapshots`` (two), ``engine_args``, ``vocabulary``, ``runs``, ``pin``, ``park``, and one for
    ``sockets``.

    The answer has, by work (``swap``, ``swap-pinned``, ``park``, ``wake``, ``sleep``, ``sleep-wake``): ``seconds`` of
    every run, to the first token of a prompt where something becomes ready; the ``reports``; and whether every answer
    was the one that these weights gave before (``equal``). Of ``park`` and ``sleep`` also MiB of the GPU's memory in
    use before (``used``) and meanwhile (``left``).
    """
    import_vllm(request["sockets"])
    from ..engines.vllm.prompted import Prompted

    yield
    extra = {"snapshot": request["snapshots"][0]}
    args = {"load_format": "thaw", "model_loader_extra_config": extra} | request["engine_args"]
    with Prompted(request["model"], **args) as engine:
        measuring = _Measuring(engine, request)
        yield
        found = measuring.swaps("swap")
        if request["pin"]:
            found |= measuring.pinned()
        if request["park"]:
            found |= measuring.parking()
        yield
    return found


TASKS = {"swap": swapping}


class _Measuring:
    """One engine, warm, that holds the first of two snapshots."""

    def __init__(self, engine: Prompted, request: dict[str, Any]) -> None:
        """Note both snapshots' answers, each asked twice: an engine that answers itself differently is not judged."""
        from ..engines.vllm.swap.api import swap_weights

        self.engine, self.request = engine, request
        self.ids = prompt(PROMPT, request["vocabulary"])
        self.answers: list[Any] = []
        for snapshot in (request["snapshots"][0], request["snapshots"][1], request["snapshots"][0]):
            if self.answers:
                swap_weights(engine.llm, snapshot)
            first, second = (self._ask() for _ in range(2))
            self.answers.append(first if first == second else None)
        if self.answers[0] != self.answers.pop() or None in self.answers:
            self.answers = [None, None]

    def swaps(self, work: str) -> dict[str, Any]:
        """To the second snapshot and back, as often as asked."""
        from ..engines.vllm.swap.api import swap_weights

        seconds, reports, equal = [], [], []
        for _ in range(self.request["runs"]):
            for number in (1, 0):
                took, report = self._until_token(partial(swap_weights, self.engine.llm, self._path(number)))
                seconds.append(took)
                reports.append(asdict(report))
                equal.append(self._equal(number))
        return {work: {"seconds": seconds, "reports": reports, "equal": _all(equal)}}

    def pinned(self) -> dict[str, Any]:
        """The same from page-locked memory."""
        from ..engines.vllm.swap.api import pin_snapshot, unpin_snapshot

        start = time.perf_counter()
        held = sum(pin_snapshot(self.engine.llm, self._path(number)) for number in (0, 1))
        pinning = time.perf_counter() - start
        found = self.swaps("swap-pinned")
        for number in (0, 1):
            unpin_snapshot(self.engine.llm, self._path(number))
        found["swap-pinned"] |= {"pinned": held, "pinning": pinning}
        return found

    def parking(self) -> dict[str, Any]:
        """Park and wake, and the same by vLLM's own sleep, level 1."""
        from ..engines.vllm.swap.parked import Parked, park, wake

        llm = self.engine.llm
        kept: list[Parked] = []

        def parks() -> Any:
            kept.append(park(llm))
            return kept[-1]

        found = self._cycles("park", "wake", parks, lambda: wake(llm, kept[-1]))
        return found | self._cycles("sleep", "sleep-wake", lambda: llm.sleep(1), lambda: llm.wake_up())

    def _cycles(self, away: str, back: str, leave: Callable[[], Any], come: Callable[[], Any]) -> dict[str, Any]:
        parks: dict[str, Any] = {"seconds": [], "reports": [], "used": [], "left": []}
        wakes: dict[str, Any] = {"seconds": [], "reports": []}
        equal = []
        for _ in range(self.request["runs"]):
            parks["used"].append(gpu_mib())
            start = time.perf_counter()
            report = leave()
            parks["seconds"].append(time.perf_counter() - start)
            parks["left"].append(gpu_mib())
            parks["reports"].append(asdict(report) if report is not None else {})
            took, report = self._until_token(come)
            wakes["seconds"].append(took)
            wakes["reports"].append(asdict(report) if hasattr(report, "seconds") else {})
            equal.append(self._equal(0))
        parks["equal"] = wakes["equal"] = _all(equal)
        return {away: parks, back: wakes}

    def _until_token(self, work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        report = work()
        self.engine.first_token(self.ids)
        return time.perf_counter() - start, report

    def _ask(self) -> dict[str, Any]:
        """With nothing cached, so that the same is computed each time."""
        self.engine.forget()
        return self.engine.answer(self.ids, ANSWER)

    def _equal(self, number: int) -> bool | None:
        wanted = self.answers[number]
        return None if wanted is None else self._ask() == wanted

    def _path(self, number: int) -> str:
        return str(self.request["snapshots"][number])


def _all(equal: list[bool | None]) -> bool | None:
    return None if None in equal else all(equal)
