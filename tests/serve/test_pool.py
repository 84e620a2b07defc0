"""Which model gets room, by which way, and what becomes of those who wait; engines are fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
from tests.serve.fake_engine import FakeEngine, refused
from tests.serve.loops import event_loops

from thaw_vllm.errors import ThawError, UsageError
from thaw_vllm.serve import changes, failures
from thaw_vllm.serve import pool as subject
from thaw_vllm.serve.config import Model, Settings
from thaw_vllm.serve.pool import Pool
from thaw_vllm.serve.resident import BusyEngineError, CutError, State, UnavailableError, UnknownModelError


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds; the program runs on the second where it is installed."""
    with event_loops(request.param):
        yield


class Bench:
    """A pool with fakes.

    Attributes:
        log: what engines were asked, in order.
        engines: all that were made.
    """

    def __init__(self, *models: Model, given: dict[str, Any] | None = None, **settings: Any) -> None:
        self.log: list[tuple[str, str]] = []
        self.engines: list[FakeEngine] = []
        self.given = given or {}
        self.pool = Pool(Settings({model.name: model for model in models}, **settings), self.make)

    def make(self, model: Model) -> FakeEngine:
        self.engines.append(FakeEngine(model, self.log, **self.given))
        return self.engines[-1]

    async def ask(self, name: str, seconds: float = 0.0, deadline: float | None = None) -> str:
        """One request; which model the engine held all the time."""
        async with self.pool.lease(name, deadline) as one:
            await asyncio.sleep(seconds)
            assert one.state is State.READY, "nothing is done to an engine that has requests"
            return one.engine.model.name

    def whys(self, *what: str) -> list[str]:
        """The reasons that were given for these events."""
        return [event.more["why"] for event in self.pool.events.last if event.what in what]

    def further_ones_fail(self, seconds: float = 0.0) -> None:
        """All engines but the first do not start, after so many seconds."""
        make = self.pool._changes._make

        def troubled(model: Model) -> FakeEngine:
            engine = make(model)
            assert isinstance(engine, FakeEngine)
            if len(self.engines) > 1:
                engine.faults["start"], engine.seconds = ThawError("no memory"), seconds
            return engine

        self.pool._changes._make = troubled

    def states(self) -> dict[str, str]:
        return {one.model.name: one.state.value for one in self.pool.residents}


def play(bench: Bench, work: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with bench.pool.running():
            found = await asyncio.wait_for(work(), 60)
        assert not bench.pool.residents and all(engine.stopped.is_set() for engine in bench.engines)
        return found

    return asyncio.run(run())


def models(*names: str, **more: Any) -> Iterable[Model]:
    return (Model(name, f"/models/{name}", **more) for name in names)


def test_a_model_that_is_there_answers_at_once():
    bench = Bench(*models("a"))

    async def work() -> None:
        assert [await bench.ask("a") for _ in range(3)] == ["a", "a", "a"]

    play(bench, work)
    assert bench.log == [("start", "a"), ("stop", "a")]


def test_requests_that_come_while_it_starts_share_the_start():
    bench = Bench(*models("a"), given={"seconds": 0.05})
    play(bench, lambda: asyncio.gather(*(bench.ask("a") for _ in range(20))))
    assert bench.log.count(("start", "a")) == 1


def test_an_unknown_model():
    bench = Bench(*models("a"))

    async def work() -> None:
        with pytest.raises(UnknownModelError, match="'b'"):
            await bench.ask("b")

    play(bench, work)
    assert bench.log == []


class TestWays:
    def test_room_is_used_before_anything_goes(self):
        bench = Bench(*models("a", "b", share=0.5), given={"swappable": True, "parkable": True})

        async def work() -> None:
            assert [await bench.ask(name) for name in "abab"] == list("abab")

        play(bench, work)
        assert bench.log[:2] == [("start", "a"), ("start", "b")] and len(bench.log) == 4

    def test_weights_are_swapped_where_they_can(self):
        bench = Bench(*models("a", "b"), given={"swappable": True, "parkable": True})

        async def work() -> None:
            assert [await bench.ask(name) for name in "abba"] == list("abba")

        play(bench, work)
        assert bench.log == [("start", "a"), ("swap", "b"), ("swap", "a"), ("stop", "a")]

    def test_what_can_be_parked_is_parked_and_woken(self):
        bench = Bench(*models("a", "b"), given={"parkable": True})

        async def work() -> None:
            assert [await bench.ask(name) for name in "abab"] == list("abab")
            assert bench.states() == {"a": "parked", "b": "ready"}

        play(bench, work)
        assert bench.log[:6] == [
            *(("start", "a"), ("park", "a"), ("start", "b")),
            *(("park", "b"), ("wake", "a"), ("park", "a")),
        ]
        assert ("wake", "b") in bench.log

    def test_a_parked_engine_takes_the_weights_of_another_model(self):
        bench = Bench(*models("a", "b", "c"), given={"parkable": True, "swappable": {"a", "b"}})

        async def work() -> None:
            assert [await bench.ask(name) for name in "acb"] == list("acb")
            assert bench.states() == {"c": "parked", "b": "ready"} and len(bench.engines) == 2

        play(bench, work)
        done = [("start", "a"), ("park", "a"), ("start", "c"), ("park", "c"), ("wake", "a"), ("swap", "b")]
        assert bench.log[:6] == done

    @pytest.mark.parametrize("refuses", [False, True])
    def test_a_parked_engine_that_does_not_is_replaced(self, refuses: bool):
        bench = Bench(*models("a", "b", "c"), given={"parkable": True, "swappable": {"a", "b"}})
        fault = refused("another rope") if refuses else ThawError("closed")

        async def work() -> None:
            for name in "ac":
                await bench.ask(name)
            bench.engines[0].faults["swap"] = fault
            assert await bench.ask("b") == "b"
            assert bench.states() == {"c": "parked", "b": "ready"} | ({"a": "parked"} if refuses else {})

        play(bench, work)
        assert len(bench.engines) == 3

    def test_else_they_are_stopped(self):
        bench = Bench(*models("a", "b"))

        async def work() -> None:
            assert [await bench.ask(name) for name in "aba"] == list("aba")

        play(bench, work)
        assert bench.log == [(what, name) for name in "aba" for what in ("start", "stop")]

    def test_the_snapshot_of_a_model_is_its_engines(self):
        """While that is being swapped it is still the one before."""
        bench = Bench(*models("a", "b"), given={"swappable": True, "snapshot": "/of-a.thaw"})

        async def work() -> None:
            assert bench.pool.snapshot("a") is None
            await bench.ask("a")
            assert (bench.pool.snapshot("a"), bench.pool.snapshot("b")) == ("/of-a.thaw", None)
            bench.engines[0].seconds = 0.05
            asking = asyncio.create_task(bench.ask("b"))
            while bench.states() != {"b": "swapping"}:
                await asyncio.sleep(0)
            assert bench.pool.snapshot("b") is None
            await asking

        play(bench, work)

    def test_what_refuses_a_swap_is_not_asked_again(self):
        bench = Bench(*models("a", "b"), given={"swappable": True, "faults": {"swap": refused("another rope")}})

        async def work() -> None:
            assert [await bench.ask(name) for name in "ab"] == list("ab")

        play(bench, work)
        assert bench.log == [("start", "a"), ("swap", "b"), ("stop", "a"), ("start", "b"), ("stop", "b")]
        told = bench.whys("swap refused")
        assert told == ["another rope"]

    @pytest.mark.parametrize("busy", [True, False])
    def test_what_is_busy_is_asked_again_later(self, busy: bool, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(changes, "BUSY", 0.05)
        bench = Bench(*models("a", "b", "c"), given={"swappable": {"a", "b"}, "parkable": True})

        async def work() -> None:
            await bench.ask("a")
            bench.engines[0].faults["swap"] = BusyEngineError("still copying") if busy else refused("another rope")
            assert [await bench.ask(name) for name in "bac"] == list("bac")
            del bench.engines[0].faults["swap"]
            await asyncio.sleep(0.1)
            (one,) = (one for one in bench.pool.residents if one.engine is bench.engines[0])
            assert one.refused == (set() if busy else {"b"})

        play(bench, work)
        assert bench.log.count(("swap", "b")) == 1, "not at once"

    def test_what_refuses_to_be_parked_is_stopped(self):
        bench = Bench(*models("a", "b"), given={"parkable": True, "faults": {"park": refused("no sleep mode")}})

        async def work() -> None:
            assert [await bench.ask(name) for name in "ab"] == list("ab")

        play(bench, work)
        assert bench.log[:4] == [("start", "a"), ("park", "a"), ("stop", "a"), ("start", "b")]

    @pytest.mark.parametrize(("what", "given"), [("swap", {"swappable": True}), ("wake", {"parkable": True})])
    def test_what_breaks_is_replaced(self, what: str, given: dict[str, bool]):
        bench = Bench(*models("a", "b"), given=given | {"faults": {what: ThawError("closed")}})

        async def work() -> None:
            assert [await bench.ask(name) for name in "aba"] == list("aba")

        play(bench, work)
        assert (what, "b" if what == "swap" else "a") in bench.log
        assert any(event.what == "lost" for event in bench.pool.events.last)

    def test_of_two_the_one_used_longest_ago_goes(self):
        bench = Bench(*models("a", "b", "c", share=0.5))

        async def work() -> None:
            for name in "abac":
                await bench.ask(name)
            assert set(bench.states()) == {"a", "c"}

        play(bench, work)

    def test_one_that_needs_all_has_all_go(self):
        bench = Bench(*models("a", "b", share=0.5), Model("c", "/models/c"))

        async def work() -> None:
            for name in "abc":
                await bench.ask(name)
            assert set(bench.states()) == {"c"}

        play(bench, work)

    def test_only_so_much_is_parked(self):
        bench = Bench(*models(*"abcd"), given={"parkable": True, "taken": 2**30}, parked_gib=2.5)

        async def work() -> None:
            for name in "abcd":
                await bench.ask(name)
            while len(bench.pool.residents) > 3:
                await asyncio.sleep(0.01)
            assert bench.states() == {"b": "parked", "c": "parked", "d": "ready"}

        play(bench, work)
        told = bench.whys("stopping")
        assert told[0] == "what is parked takes 3.0 GiB of host memory, more than 2.5"

    def test_what_is_too_large_is_not_parked_again(self):
        bench = Bench(*models("a", "b"), given={"parkable": True, "taken": 2**32}, parked_gib=2.5)

        async def work() -> None:
            for name in "abab":
                assert await bench.ask(name) == name

        play(bench, work)
        assert bench.log.count(("park", "a")) == bench.log.count(("park", "b")) == 1

    def test_where_none_is_parked_none_can_be_asked_to(self):
        bench = Bench(*models("a"), given={"parkable": True}, parked=0)

        async def work() -> None:
            await bench.ask("a")
            with pytest.raises(UsageError, match=r"parks none \(parked = 0\)"):
                await bench.pool.unload("a", park=True)
            assert bench.states() == {"a": "ready"}

        play(bench, work)

    def test_only_so_many_are_parked(self):
        bench = Bench(*models(*"abcd"), given={"parkable": True}, parked=2)

        async def work() -> None:
            for name in "abcd":
                await bench.ask(name)
            while len(bench.pool.residents) > 3:
                await asyncio.sleep(0.01)
            assert bench.states() == {"b": "parked", "c": "parked", "d": "ready"}

        play(bench, work)


class TestWaiting:
    def test_who_comes_first_is_served_first(self):
        """a holds the engine and is asked without a pause; b is there once a's requests have ended."""
        bench = Bench(*models("a", "b"), drain=60)
        order: list[str] = []

        async def client(name: str) -> None:
            await bench.ask(name, 0.02)
            order.append(name)

        async def work() -> None:
            await bench.ask("a")
            running = [asyncio.create_task(client("a")) for _ in range(4)]
            await asyncio.sleep(0.005)
            waits = asyncio.create_task(client("b"))
            await asyncio.sleep(0.005)
            late = [asyncio.create_task(client("a")) for _ in range(4)]
            await asyncio.gather(*running, waits, *late)

        play(bench, work)
        assert order == ["a"] * 4 + ["b"] + ["a"] * 4

    def test_after_the_drain_it_goes_anyway(self):
        bench = Bench(*models("a", "b"), drain=0.1)

        async def work() -> None:
            asking = asyncio.create_task(bench.ask("a", 30))
            while not bench.pool.residents or not bench.pool.residents[0].inflight:
                await asyncio.sleep(0.001)
            assert await bench.ask("b", deadline=10) == "b"
            with pytest.raises(CutError, match="send the request again"):
                await asking

        play(bench, work)

    def test_a_deadline(self):
        bench = Bench(*models("a", "b"), drain=60)

        async def work() -> None:
            async with bench.pool.lease("a"):
                with pytest.raises(UnavailableError, match=r"not there within 0\.1 s") as told:
                    await bench.ask("b", deadline=0.1)
                assert told.value.retry_after > 0 and bench.pool.waiting == {}
                assert await bench.ask("a", deadline=1) == "a", "nobody needs its room any more"

        play(bench, work)
        assert ("start", "b") not in bench.log

    def test_what_was_given_another_task_is_not_answered_for(self):
        """A request that outlives the drain sees no other model's weights: it is cut before they are swapped."""
        bench = Bench(*models("a", "b"), given={"swappable": True}, drain=0.05)

        async def work() -> None:
            asking = asyncio.create_task(bench.ask("a", 30))
            while not bench.pool.residents or not bench.pool.residents[0].inflight:
                await asyncio.sleep(0.001)
            assert await bench.ask("b") == "b" and asking.done() and isinstance(asking.exception(), CutError)

        play(bench, work)
        assert bench.log[:2] == [("start", "a"), ("swap", "b")]

    def test_room_is_kept_for_who_waits_for_one_that_is_coming(self):
        bench = Bench(*models("x", "b", share=0.5), Model("a", "/a"), given={"seconds": 0.05})

        async def work() -> None:
            asked = [asyncio.create_task(bench.ask("x"))]
            await asyncio.sleep(0.01)
            asked += [asyncio.create_task(bench.ask(name)) for name in "ab"]
            await asyncio.gather(*asked)

        play(bench, work)
        assert [one for one in bench.log if one[0] == "start"] == [("start", "x"), ("start", "a"), ("start", "b")]

    def test_a_request_cannot_wait_longer_than_its_model_allows(self):
        bench = Bench(Model("a", "/a", deadline=0.05), given={"seconds": 1})

        async def work() -> None:
            with pytest.raises(UnavailableError, match=r"within 0\.05 s"):
                await bench.ask("a", deadline=1e6)

        play(bench, work)

    def test_one_whose_start_takes_longer_than_a_request_may_wait_comes_all_the_same(self):
        bench = Bench(Model("a", "/a", deadline=0.1), *models("b"), given={"seconds": 0.2})

        async def work() -> None:
            await bench.pool.load("a")
            await bench.ask("b")
            with pytest.raises(UnavailableError, match="takes some"):
                await bench.ask("a")
            while bench.states().get("a") != "ready":
                await asyncio.sleep(0.01)
            assert await bench.ask("a") == "a"

        play(bench, work)

    def test_a_deadline_that_cannot_be_met_is_said_at_once(self):
        bench = Bench(*models("a", "b"), given={"seconds": 0.2})

        async def work() -> None:
            await bench.ask("b")
            await bench.ask("a")
            start = asyncio.get_running_loop().time()
            with pytest.raises(UnavailableError, match=r"takes some 0\.\d s"):
                await bench.ask("b", deadline=0.05)
            assert asyncio.get_running_loop().time() - start < 0.04
            assert await bench.ask("a") == "a"

        play(bench, work)

    def test_who_leaves_is_not_served(self):
        bench = Bench(*models("a", "b"), given={"seconds": 0.05})

        async def work() -> None:
            tasks = [asyncio.create_task(bench.ask(name)) for name in "ab" * 20]
            await asyncio.sleep(0.02)
            for task in tasks[::3]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(one, asyncio.CancelledError) for one in found) == len(tasks[::3])
            assert all(one.inflight == 0 for one in bench.pool.residents) and bench.pool.waiting == {}

        play(bench, work)


class TestFaults:
    @pytest.mark.parametrize("what", ["start", "swap", "park", "wake"])
    def test_an_error_that_nobody_expected_blocks_nobody(self, what: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(failures, "BACKOFF", (0.05,))
        given = {"swappable": what == "swap", "parkable": True, "faults": {what: OSError(24, "too many files")}}
        bench = Bench(*models("a", "b"), given=given)

        async def work() -> None:
            with contextlib.suppress(UnavailableError):
                for name in "aba":
                    await bench.ask(name)
            bench.given = {}
            for engine in bench.engines:
                engine.faults.clear()
            await asyncio.sleep(0.1)
            assert [await bench.ask(name) for name in "ab"] == ["a", "b"]

        play(bench, work)
        told = bench.whys("lost", "failed")
        assert any("too many files" in why for why in told)

    def test_a_start_that_fails_is_told_and_not_tried_at_once(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(failures, "BACKOFF", (0.2,))
        bench = Bench(*models("a", "b"), given={"faults": {"start": ThawError("no memory")}})

        async def work() -> None:
            told = await asyncio.gather(*(bench.ask("a") for _ in range(5)), return_exceptions=True)
            assert all(isinstance(one, UnavailableError) and "no memory" in str(one) for one in told)
            with pytest.raises(UnavailableError, match="no memory") as again:
                await bench.ask("a")
            assert 0 < again.value.retry_after <= 0.2 and bench.log.count(("start", "a")) == 1
            bench.given = {}
            assert await bench.ask("b") == "b", "others are not kept from starting"
            await asyncio.sleep(0.25)
            assert await bench.ask("a") == "a" and bench.pool.failure("a") is None

        play(bench, work)

    def test_an_engine_that_dies_is_replaced(self):
        bench = Bench(*models("a"))

        async def work() -> None:
            await bench.ask("a")
            bench.engines[0].stopped.set()  # as if killed
            await asyncio.sleep(0.01)
            assert bench.pool.residents == []
            assert await bench.ask("a") == "a" and len(bench.engines) == 2
            assert [event.more["why"] for event in bench.pool.events.last if event.what == "lost"] == [
                "its server ended with -9"
            ]

        play(bench, work)

    def test_one_that_dies_while_it_is_waited_for(self):
        bench = Bench(*models("a", "b"), given={"parkable": True, "seconds": 0.05})

        async def work() -> None:
            await bench.ask("a")
            asking = asyncio.create_task(bench.ask("b"))
            await asyncio.sleep(0.02)
            assert bench.states() == {"a": "parking"}
            bench.engines[0].stopped.set()
            assert await asking == "b"

        play(bench, work)


class TestPinned:
    def test_it_does_not_take_more_than_its_share_by_a_swap(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(failures, "BACKOFF", (0.05,))
        pinned, large, small = (
            Model("p", "/p", share=0.4, pinned=True),
            Model("a", "/a", share=0.6),
            Model("b", "/b", share=0.4),
        )
        bench = Bench(pinned, large, small, given={"swappable": True, "faults": {"start": ThawError("no")}})

        async def work() -> None:
            while bench.pool.failure("p") is None:
                await asyncio.sleep(0.001)
            bench.given = {"swappable": True}
            for name in "abab":
                await bench.ask(name)
            while bench.states().get("p") != "ready":
                await asyncio.sleep(0.01)
            assert [await bench.ask(name) for name in "abpab"] == list("abpab")
            assert sum(one.share for one in bench.pool.residents) <= 1 + 1e-9

        play(bench, work)

    def test_it_is_there_before_it_is_asked_and_stays(self):
        bench = Bench(Model("a", "/a", share=0.5, pinned=True), *models("b", "c", share=0.5), given={"swappable": True})

        async def work() -> None:
            while bench.states().get("a") != "ready":
                await asyncio.sleep(0.001)
            for name in "bcbc":
                await bench.ask(name)
            with pytest.raises(UsageError, match="pinned"):
                await bench.pool.unload("a")
            bench.engines[0].stopped.set()
            while bench.states().get("a") != "ready":
                await asyncio.sleep(0.001)

        play(bench, work)
        assert bench.log.count(("start", "a")) == 2 and ("swap", "a") not in bench.log

    def test_there_must_be_room_beside_it(self):
        with pytest.raises(UsageError, match="no room beside what is pinned"):
            Bench(Model("a", "/a", pinned=True, share=0.6), Model("b", "/b", share=0.5))
        bench = Bench(Model("a", "/a", pinned=True, share=0.6))

        async def work() -> None:
            with pytest.raises(UsageError, match="no room"):
                bench.pool.register(Model("b", "/b"))
            bench.pool.register(Model("c", "/c", share=0.4))
            with pytest.raises(UsageError, match="already"):
                bench.pool.register(Model("c", "/c", share=0.4))
            assert await bench.ask("c") == "c"

        play(bench, work)


class TestHowMany:
    def test_a_minimum_is_there_and_idle_times_leave_it(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(subject, "TICK", 0.01)
        several = Model("a", "/a", share=0.3, minimum=2, maximum=2, idle_stop=0.05)
        bench = Bench(several, Model("b", "/b", share=0.3, idle_stop=0.05))

        async def work() -> None:
            while [one.state for one in bench.pool.residents] != [State.READY] * 2:
                await asyncio.sleep(0.005)
            assert await bench.ask("b") == "b"
            while len(bench.pool.residents) > 2:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.15)
            with pytest.raises(UsageError, match="to have 2 engines"):
                await bench.pool.unload("a")

        play(bench, work)
        assert [name for what, name in bench.log if what == "start"] == ["a", "a", "b"]

    def test_it_makes_room_and_comes_back(self):
        bench = Bench(Model("a", "/a", minimum=1), Model("b", "/b"))

        async def work() -> None:
            assert [await bench.ask(name) for name in "ab"] == ["a", "b"]
            await bench.pool.unload("b")
            while bench.states() != {"a": "ready"}:
                await asyncio.sleep(0.005)

        play(bench, work)

    def test_what_is_busy_gets_another_in_free_room(self):
        bench = Bench(Model("a", "/a", share=0.3, maximum=2, busy=2), Model("b", "/b", share=0.5))

        async def work() -> None:
            held = [asyncio.create_task(bench.ask("a", 0.2)) for _ in range(2)]
            while len(bench.pool.residents) < 2:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.01)
            held += [asyncio.create_task(bench.ask("a", 0.2)) for _ in range(4)]
            await asyncio.sleep(0.02)
            assert sorted(one.inflight for one in bench.pool.residents) == [3, 3]
            assert await asyncio.gather(*held) == ["a"] * 6
            assert await bench.ask("b") == "b", "who has two makes room"

        play(bench, work)
        assert bench.log.count(("start", "a")) == 2

    def test_one_too_many_goes(self):
        """Its engine was to take another model and would not, when another was there already."""
        given = {"swappable": True, "faults": {"swap": refused("no")}, "seconds": 0.05}
        bench = Bench(
            Model("a", "/a", share=0.4), Model("b", "/b", share=0.4), Model("c", "/c", share=0.2), given=given
        )

        async def work() -> None:
            for name in "ac":
                assert await bench.ask(name) == name
            held = asyncio.create_task(bench.ask("c", 0.5))
            await asyncio.sleep(0)
            (one,) = (one for one in bench.pool.residents if one.model.name == "a")
            swapping = bench.pool._changes.swap(one, bench.pool.models["b"])
            assert await bench.ask("a") == "a"
            await swapping
            while len(bench.pool.residents) > 2:
                await asyncio.sleep(0.005)
            assert await held == "c" and sorted(bench.states()) == ["a", "c"]

        play(bench, work)

    def test_nobody_makes_room_for_a_second(self):
        bench = Bench(Model("a", "/a", share=0.6, maximum=3, busy=1), Model("b", "/b", share=0.4))

        async def work() -> None:
            assert await bench.ask("b") == "b"
            assert await asyncio.gather(*(bench.ask("a", 0.05) for _ in range(5))) == ["a"] * 5
            assert bench.states() == {"a": "ready", "b": "ready"}

        play(bench, work)
        assert bench.log.count(("start", "a")) == 1

    def test_of_pinned_ones_the_surplus_makes_room(self):
        pinned = Model("a", "/a", share=0.3, pinned=True, maximum=2, busy=1)
        bench = Bench(pinned, Model("b", "/b", share=0.5))

        async def work() -> None:
            held = [asyncio.create_task(bench.ask("a", 0.05)) for _ in range(2)]
            while len(bench.pool.residents) < 2:
                await asyncio.sleep(0.005)
            await asyncio.gather(*held)
            assert await bench.ask("b") == "b"
            assert bench.states() == {"a": "ready", "b": "ready"} and len(bench.pool.residents) == 2

        play(bench, work)

    def test_one_that_does_not_start_is_left_alone_beside_one_that_runs(self):
        bench = Bench(Model("a", "/a", share=0.4, minimum=2, maximum=2))
        bench.further_ones_fail()

        async def work() -> None:
            assert await bench.ask("a") == "a"
            await asyncio.sleep(0.3)
            assert await bench.ask("a") == "a" and "no memory" in str(bench.pool.failure("a"))

        play(bench, work)
        assert bench.log.count(("start", "a")) == 2, "the next in a second"

    def test_the_one_that_comes_answers_where_another_does_not_start(self):
        bench = Bench(Model("a", "/a", share=0.4, minimum=2, maximum=2), given={"seconds": 0.1})
        bench.further_ones_fail(0.01)

        async def work() -> None:
            early = asyncio.create_task(bench.ask("a"))
            await asyncio.sleep(0.05)
            assert bench.pool.failure("a") is not None
            assert await bench.ask("a") == await early == "a"

        play(bench, work)

    def test_an_idle_one_stays_while_the_others_are_busy(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(subject, "TICK", 0.01)
        bench = Bench(Model("a", "/a", share=0.4, maximum=2, busy=2, idle_stop=0.05))

        async def work() -> None:
            await asyncio.gather(*(bench.ask("a", 0.5) for _ in range(2)))
            while len(bench.pool.residents) > 1:
                await asyncio.sleep(0.005)

        play(bench, work)
        assert bench.log.count(("start", "a")) == 2

    def test_who_waits_goes_where_fewest_are(self):
        bench = Bench(Model("a", "/a", share=0.4, minimum=2, maximum=2), given={"seconds": 0.02})

        async def work() -> None:
            asked = [asyncio.create_task(bench.ask("a", 0.2)) for _ in range(6)]
            while len([one for one in bench.pool.residents if one.state is State.READY]) < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert sorted(one.inflight for one in bench.pool.residents) in ([3, 3], [0, 6])
            asked += [asyncio.create_task(bench.ask("a", 0.05)) for _ in range(6)]
            await asyncio.sleep(0.02)
            assert [one.inflight for one in bench.pool.residents] == [6, 6]
            await asyncio.gather(*asked)

        play(bench, work)

    def test_the_last_of_the_pinned_ones_never_goes(self):
        pinned = Model("p", "/p", share=0.3, pinned=True, maximum=2, busy=1)
        bench = Bench(pinned, Model("r", "/r", share=0.4), Model("q", "/q", share=0.6))

        async def work() -> None:
            held = [asyncio.create_task(bench.ask("p", 0.05)) for _ in range(2)]
            while len(bench.pool.residents) < 2:
                await asyncio.sleep(0.005)
            await asyncio.gather(*held)
            assert await bench.ask("r") == "r" and len(bench.pool.residents) == 3
            asking = asyncio.create_task(bench.ask("q"))
            while not asking.done():
                assert [one for one in bench.pool.residents if one.model is pinned and one.state is State.READY]
                await asyncio.sleep(0)
            assert await asking == "q"

        play(bench, work)

    def test_one_that_starts_does_not_stand_for_the_pinned_one(self):
        pinned = Model("p", "/p", share=0.3, pinned=True, maximum=2, busy=1)
        bench = Bench(pinned, Model("q", "/q", share=0.6), drain=0.05)

        async def work() -> None:
            while bench.states() != {"p": "ready"}:
                await asyncio.sleep(0.001)
            bench.given = {"seconds": 0.3}
            held = asyncio.create_task(bench.ask("p", 0.2))
            while len(bench.pool.residents) < 2:
                await asyncio.sleep(0.001)
            asking = asyncio.create_task(bench.ask("q"))
            assert await held == "p", "it was not cut"
            assert await asking == "q"

        play(bench, work)

    def test_pinned_ones_must_have_room(self):
        with pytest.raises(UsageError, match=r"pinned: the shares of its 3 engines are more than 1"):
            Bench(Model("a", "/a", share=0.4, pinned=True, minimum=3, maximum=3))


class TestIdle:
    def test_it_is_parked_and_then_stopped(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(subject, "TICK", 0.01)
        bench = Bench(Model("a", "/a", idle_park=0.05, idle_stop=0.2), given={"parkable": True})

        async def work() -> None:
            async with bench.pool.lease("a"):
                await asyncio.sleep(0.1)
                assert bench.states() == {"a": "ready"}, "it is not idle"
            while bench.pool.residents:
                await asyncio.sleep(0.005)

        play(bench, work)
        assert bench.log == [("start", "a"), ("park", "a"), ("stop", "a")]

    @pytest.mark.parametrize("park", [False, True])
    def test_unload(self, park: bool):
        bench = Bench(*models("a"), given={"parkable": True})

        async def work() -> None:
            with pytest.raises(UsageError, match="not there"):
                await bench.pool.unload("a")
            asking = asyncio.create_task(bench.ask("a", 0.05))
            await asyncio.sleep(0.02)
            await bench.pool.unload("a", park=park)
            assert asking.done() and bench.states() == ({"a": "parked"} if park else {})
            assert await bench.ask("a") == "a"

        play(bench, work)
        assert bench.log[1:3] == ([("park", "a"), ("wake", "a")] if park else [("stop", "a"), ("start", "a")])

    def test_what_holds_another_model_by_then_is_left_alone(self):
        """An unload that waits for a request does not hit the model that came into the engine meanwhile."""
        bench = Bench(*models("a", "b"), given={"swappable": True}, drain=30)

        async def work() -> None:
            asking = asyncio.create_task(bench.ask("a", 0.1))
            while not bench.pool.residents or not bench.pool.residents[0].inflight:
                await asyncio.sleep(0.001)
            unloading = asyncio.create_task(bench.pool.unload("a"))
            await asyncio.sleep(0.01)
            again = asyncio.create_task(bench.ask("a"))
            other = asyncio.create_task(bench.ask("b", 0.1))
            await asyncio.gather(asking, unloading, again, other)

        play(bench, work)
        assert ("swap", "a") not in bench.log[:1] and bench.log[:2] == [("start", "a"), ("stop", "a")]

    def test_a_parked_engine_that_takes_more_than_its_model(self):
        """Its share is the one that it was started with."""
        wide, narrow, third = Model("a", "/a"), Model("b", "/b", share=0.5), Model("c", "/c", share=0.5)
        bench = Bench(wide, narrow, third, given={"swappable": True, "parkable": True})

        async def work() -> None:
            for name in "ab":
                await bench.ask(name)
            bench.engines[0].swappable = False
            for name in "cbcb":
                await bench.ask(name)
                assert sum(one.share for one in bench.pool.residents if not one.away) <= 1 + 1e-9

        play(bench, work)

    def test_parking_that_is_refused_is_told(self):
        bench = Bench(*models("a"), given={"faults": {"park": refused("no sleep mode")}})

        async def work() -> None:
            await bench.ask("a")
            with pytest.raises(UsageError, match="no sleep mode"):
                await bench.pool.unload("a", park=True)
            assert await bench.ask("a") == "a"

        play(bench, work)


@pytest.mark.soak
def test_any_load_is_answered_rightly(soak):
    """Random requests for models of random shares, engines that refuse, break and die: each answer is its model's, all
    end, and the engines never take more than there is."""
    for case in soak(small=40, full=600):
        draw = case.random
        names = "abcde"[: draw.randint(1, 5)]
        shares = {name: draw.choice([0.25, 0.4, 0.5, 1.0]) for name in names}
        family = set(draw.sample(names, draw.randint(0, len(names))))
        given = {"swappable": draw.choice([False, True, family]), "parkable": draw.random() < 0.5, "taken": 2**30}
        counts = {name: draw.choice([(0, 1), (0, 1), (1, 1), (0, 2), (1, 3)]) for name in names}
        served = [
            Model(
                n,
                "/m",
                share=shares[n],
                deadline=30,
                minimum=counts[n][0],
                maximum=counts[n][1],
                busy=draw.randint(1, 9),
            )
            for n in names
        ]
        bench = Bench(*served, given=given, drain=30, parked=2, parked_gib=draw.choice([None, 1.5]))
        make = bench.make

        def troubled(model: Model, make=make, draw=draw) -> FakeEngine:
            engine = make(model)
            engine.seconds = draw.choice([0, 0.001, 0.003])
            for what in ("swap", "park", "wake"):
                if draw.random() < 0.1:
                    engine.faults[what] = ThawError("broken") if draw.random() < 0.5 else refused("no")
            engine.faults.pop("wake", None) if draw.random() < 0.5 else None
            return engine

        bench.pool._changes._make = troubled
        asked = [(draw.choice(names), draw.choice([0, 0.001, 0.004]), draw.random() * 0.05) for _ in range(60)]

        async def client(name: str, seconds: float, after: float, bench=bench, counts=counts) -> bool:
            await asyncio.sleep(after)
            while True:
                with contextlib.suppress(CutError):  # its engine was killed: sent again, as it is told
                    async with bench.pool.lease(name) as one:
                        held = one.engine.model.name
                        await asyncio.sleep(seconds)
                        taken = sum(r.share for r in bench.pool.residents if not r.away)
                        assert taken <= 1 + 1e-6, "more than there is"
                        there = [r for r in bench.pool.residents if r.model.name == name and r.state is State.READY]
                        came_back = [e for e in bench.pool.events.last if e.what in ("swap refused", "parking refused")]
                        assert came_back or len(there) <= counts[name][1], "more than its maximum"
                        return one.engine.model.name == held == name

        async def killer(bench=bench, draw=draw) -> None:
            for _ in range(3):
                await asyncio.sleep(draw.random() * 0.02)
                with contextlib.suppress(IndexError):
                    draw.choice(bench.engines).stopped.set()

        async def work(bench=bench, asked=asked, killer=killer, client=client) -> list[bool]:
            killing = asyncio.create_task(killer())
            found = await asyncio.gather(*(client(*one) for one in asked))
            await killing
            return found

        assert all(play(bench, work)), case
