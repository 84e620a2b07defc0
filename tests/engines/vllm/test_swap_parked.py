"""Calls that park and wake an engine, and swap in an asynchronous one; engine and driver are made up."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engines.vllm.fake_core import FakeCore

import thaw_vllm
from thaw_vllm.engines.vllm import client, versions
from thaw_vllm.engines.vllm.answers import answering
from thaw_vllm.engines.vllm.swap import api, parked
from thaw_vllm.engines.vllm.swap import core as swap_core
from thaw_vllm.errors import (
    BrokenEngineError,
    DeviceError,
    MismatchError,
    StorageError,
    ThawError,
    UnsupportedError,
    UsageError,
)
from thaw_vllm.weights.open import open_snapshot

pytestmark = pytest.mark.vllm

WORK: dict[str, Callable[..., Any]] = {
    "thaw_swap_check": swap_core.check,
    "thaw_swap": swap_core.swap,
    "thaw_swap_finish": swap_core.finish,
    "thaw_park_check": swap_core.parkable,
    "thaw_park": swap_core.park,
    "thaw_wake": swap_core.wake,
}


class FakeLLM:
    """A ``vllm.LLM`` whose engine core is made up (fake_core.py); notes what it is asked, and whether it was closed."""

    def __init__(self, core: FakeCore, log: list[str]) -> None:
        self.core, self.log, self.closed = core, log, False
        self.llm_engine = SimpleNamespace(
            engine_core=self,
            has_unfinished_requests=lambda: bool(core.scheduler.requests),
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1)),
        )

    def call_utility(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        if method != "thaw_park_check":
            self.log.append(method)
        return answering(WORK[method])(self.core, options)

    def shutdown(self) -> None:
        self.closed = True


class FakeAsync:
    """An ``AsyncLLM`` alike. What its core is asked is done, even if who asked is gone by then.

    Attributes:
        until: method → what it waits for, before it is done.
    """

    def __init__(self, core: FakeCore, log: list[str]) -> None:
        self.core, self.log, self.closed = core, log, False
        self.engine_core = self
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
        self.until: dict[str, asyncio.Event] = {}
        self.broken_pause: Exception | None = None

    async def call_utility_async(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.shield(asyncio.ensure_future(self._work(method, options)))

    async def _work(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        if method != "thaw_park_check":
            self.log.append(method)
        if method in self.until:
            await self.until[method].wait()
        answer: dict[str, Any] = answering(WORK[method])(self.core, options)
        return answer

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert not clear_cache
        self.log.append(f"pause {mode}")
        if self.broken_pause is not None:
            raise self.broken_pause
        self.core.paused = True
        if mode == "abort":
            self.core.pause_scheduler("abort", clear_cache=False)
        while mode == "wait" and self.core.scheduler.requests:
            await asyncio.sleep(0.002)

    async def is_paused(self) -> bool:
        return bool(self.core.paused)

    async def resume_generation(self) -> None:
        self.log.append("resume")
        self.core.resume_scheduler()

    async def reset_mm_cache(self) -> None:
        self.log.append("reset mm")

    def shutdown(self) -> None:
        self.closed = True


def test_an_engine_core_that_dies_before_it_answers():
    """vLLM notes it and leaves whoever waits waiting."""
    over = threading.Event()
    resources = SimpleNamespace(engine_dead=False)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    class Client:
        def call_utility(self, method: str, options: dict[str, Any]) -> None:
            resources.engine_dead = True
            over.wait()

        async def call_utility_async(self, method: str, options: dict[str, Any]) -> None:
            resources.engine_dead = True
            await asyncio.Event().wait()

    core = Client()
    core.resources = resources  # type: ignore[attr-defined]
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core, vllm_config=config))
    with pytest.raises(BrokenEngineError, match="died meanwhile"):
        client.call(llm, "thaw_swap", {})  # type: ignore[arg-type]
    engine = SimpleNamespace(engine_core=core, vllm_config=config)
    with pytest.raises(BrokenEngineError, match="died meanwhile"):
        asyncio.run(client.ask(engine, "thaw_swap", {}))
    over.set()


def test_a_swap_in_an_engine_core_that_dies():
    """Nobody waits for it to go on afterwards."""
    log: list[str] = []
    engine = FakeAsync(FakeCore(), log)
    engine.resources = SimpleNamespace(engine_dead=False)  # type: ignore[attr-defined]
    engine.until["thaw_swap"] = asyncio.Event()

    async def run() -> None:
        swap = asyncio.ensure_future(api.swap_weights_async(engine, "/tmp/new.thaw", deadline=0))  # type: ignore[arg-type]
        while "thaw_swap" not in log:
            await asyncio.sleep(0.01)
        engine.resources.engine_dead = True  # type: ignore[attr-defined]
        await swap

    with pytest.raises(BrokenEngineError, match="died meanwhile"):
        asyncio.run(run())
    assert "resume" not in log


@pytest.mark.parametrize("name", ["is_paused", "pause_generation"])
def test_an_engine_core_that_dies_while_it_is_paused(name: str, monkeypatch: pytest.MonkeyPatch):
    engine = FakeAsync(FakeCore(), [])
    engine.resources = SimpleNamespace(engine_dead=False)  # type: ignore[attr-defined]

    async def hang(**_: Any) -> None:
        engine.resources.engine_dead = True  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, name, hang)
    with pytest.raises(BrokenEngineError, match="died meanwhile"):
        asyncio.run(api.swap_weights_async(engine, "/tmp/new.thaw", deadline=0))  # type: ignore[arg-type]


class Driver:
    """In place of process_checkpoint; the snapshot's file may change while an engine is parked."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.why: str | None = None
        self.refuses: DeviceError | None = None
        self.refuses_to_wake: DeviceError | None = None
        self.parked: list[int] = []
        self.ended: list[int] = []
        self.after_refusal = "running"

    def unsupported(self) -> str | None:
        return self.why

    def has_ended(self, pid: int) -> bool:
        return pid in self.ended

    def park(self, pids: list[int], *, timeout: float) -> None:
        assert timeout > 0
        self.log.append(f"driver park {pids}")
        if self.refuses is not None:
            raise self.refuses
        self.parked += pids

    def state(self, pid: int) -> str:
        return "checkpointed" if pid in self.parked else self.after_refusal

    def wake(self, pids: list[int]) -> None:
        self.log.append(f"driver wake {pids}")
        if self.refuses_to_wake is not None:
            raise self.refuses_to_wake
        self.parked = [pid for pid in self.parked if pid not in pids]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def driver(log: list[str], monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(log)
    monkeypatch.setattr(parked, "process_checkpoint", made)
    monkeypatch.setattr(versions, "ask_core", lambda core, *args: core.ask(*args))
    return made


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "weights.thaw"
    thaw_vllm.freeze_model(torch.nn.Linear(4, 4), path)
    return path


@pytest.fixture
def core(snapshot: Path) -> FakeCore:
    made = FakeCore()
    with open_snapshot(snapshot) as opened:
        made.tells["thaw_source"] = {"path": str(snapshot), "content": opened.snapshot.header.content, "set": None}
    return made


@pytest.fixture
def kv(log: list[str], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Freezing and restoring KV blocks, synchronous and not; ``fails``: what freezing raises."""
    found = SimpleNamespace(fails=None, fails_to_restore=None)

    def freeze(engine: Any, path: Any, *, force: bool = False) -> Any:
        log.append(f"KV freeze {Path(path).name} {force}")
        if found.fails is not None:
            raise found.fails
        return SimpleNamespace(path=str(path))

    def restore(engine: Any, path: Any) -> Any:
        log.append(f"KV restore {Path(path).name}")
        if found.fails_to_restore is not None:
            raise found.fails_to_restore
        return SimpleNamespace(blocks=5)

    async def freeze_async(*args: Any, **options: Any) -> Any:
        return freeze(*args, **options)

    async def restore_async(*args: Any) -> Any:
        return restore(*args)

    for name, value in [("freeze", freeze), ("restore", restore)]:
        monkeypatch.setattr(parked, f"{name}_kv_cache", value)
    for name, value in [("freeze", freeze_async), ("restore", restore_async)]:
        monkeypatch.setattr(parked, f"{name}_kv_cache_async", value)
    return found


class Both:
    """One engine, asked in the one way or the other."""

    def __init__(self, kind: str, core: FakeCore, log: list[str]) -> None:
        self.kind, self.core = kind, core
        self.engine: Any = FakeLLM(core, log) if kind == "sync" else FakeAsync(core, log)

    def park(self, **options: Any) -> parked.Parked:
        if self.kind == "sync":
            return parked.park(self.engine, **options)
        return asyncio.run(parked.park_async(self.engine, **options))

    def wake(self, found: parked.Parked, **options: Any) -> parked.WakeReport:
        if self.kind == "sync":
            return parked.wake(self.engine, found, **options)
        return asyncio.run(parked.wake_async(self.engine, found, **options))


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest, core: FakeCore, log: list[str]) -> Both:
    return Both(request.param, core, log)


def asked(log: list[str]) -> list[str]:
    """Without what pauses an asynchronous engine first."""
    return [one for one in log if not one.startswith("pause")]


def awake(core: FakeCore) -> bool:
    return not core.paused and not core.model_executor.is_sleeping and core.weights == "old"


# --- Both ways --------------------------------------------------------------------------------------------------------


def test_parked_and_woken(both: Both, snapshot: Path, driver: Driver, log: list[str]):
    found = both.park()
    assert asked(log) == ["thaw_park", "driver park [42]"] and driver.parked == [42]
    assert (found.pids, found.driver, found.why, found.left, found.kv) == ([42], True, "", 7, None)
    assert found.path == str(snapshot) and found.contents
    assert list(found.seconds) == ["check", "drain", "sleep", "trim", "total", "driver"]
    assert found.seconds["total"] >= found.seconds["driver"]
    log.clear()
    report = both.wake(found, verify=False)
    assert log == ["driver wake [42]", "thaw_wake"] and driver.parked == []
    assert both.core.filled_with == {"path": str(snapshot), "contents": found.contents, "verify": False}
    assert (report.bytes, report.blocks, report.aborted) == (10, 0, 0) and awake(both.core)
    phases = ["driver", "check", "weights' memory", "fill", "other memory", "canary", "KV", "total"]
    assert list(report.seconds) == phases


def test_weights_in_host_memory(both: Both, snapshot: Path):
    found = both.park(keep_weights=True)
    assert (found.path, found.contents) == (None, None)
    snapshot.unlink()
    assert both.wake(found).bytes == 0 and awake(both.core)


def test_without_the_driver(both: Both, log: list[str]):
    found = both.park(driver=False)
    assert (found.driver, found.why) == (False, "it was not to be asked")
    both.wake(found)
    assert not any(one.startswith("driver") for one in log) and awake(both.core)


@pytest.mark.parametrize("wanted", [None, True])
@pytest.mark.parametrize(
    ("obstacle", "said"),
    [("driver", "older than 570"), ("own process", "runs in this process"), ("several ranks", "has several ranks")],
)
def test_where_the_driver_cannot(
    obstacle: str, said: str, wanted: bool | None, both: Both, driver: Driver, log: list[str]
):
    if obstacle == "driver":
        driver.why = "the NVIDIA driver is older than 570"
    elif obstacle == "own process":
        both.core.tells["thaw_pid"] = {"pid": os.getpid()}
    else:
        real = both.core.model_executor.collective_rpc
        both.core.model_executor.collective_rpc = lambda *a, **k: real(*a, **k) * 2  # type: ignore[method-assign]
    if wanted:
        with pytest.raises(UnsupportedError, match=f"cannot take the engine's state: .*{said}"):
            both.park(driver=True)
        assert awake(both.core), "nobody has anything to wake it with"
    else:
        found = both.park()
        assert not found.driver and said in found.why
        both.wake(found)
    assert not any(one.startswith("driver") for one in log) and awake(both.core)


@pytest.mark.parametrize("wanted", [None, True])
def test_where_the_driver_refuses(wanted: bool | None, both: Both, driver: Driver, log: list[str]):
    driver.refuses = DeviceError("process 42 cannot be locked: not permitted")
    if wanted:
        with pytest.raises(DeviceError, match="not permitted"):
            both.park(driver=True)
        assert asked(log) == ["thaw_park", "driver park [42]", "thaw_wake"]
    else:
        found = both.park()
        assert (found.driver, found.why) == (False, "process 42 cannot be locked: not permitted")
        assert both.core.weights == "gone"
        both.wake(found)
    assert awake(both.core) and "driver wake [42]" not in log


def test_a_refused_park_leaves_it_awake(both: Both, log: list[str]):
    both.core.tells["thaw_source"] = {"error": "MismatchError", "message": "its snapshot is gone"}
    with pytest.raises(MismatchError, match="its snapshot is gone"):
        both.park()
    assert awake(both.core) and not any(one.startswith("driver") for one in log)


def test_blocks_of_the_kv_cache(both: Both, kv: Any, log: list[str], tmp_path: Path):
    found = both.park(kv=tmp_path / "cache.thawkv", force=True)
    assert asked(log) == ["KV freeze cache.thawkv True", "thaw_park", "driver park [42]"]
    assert found.kv == str(tmp_path / "cache.thawkv") and "KV" in found.seconds
    log.clear()
    assert both.wake(found).blocks == 5
    assert log == ["driver wake [42]", "thaw_wake", "KV restore cache.thawkv"]


def test_an_empty_kv_cache(both: Both, kv: Any, log: list[str], tmp_path: Path):
    kv.fails = UsageError("there is nothing to freeze: none of these tokens fills a cached block")
    found = both.park(kv=tmp_path / "cache.thawkv")
    assert found.kv is None and "KV" not in found.seconds
    assert both.wake(found).blocks == 0 and not any("restore" in one for one in log)


@pytest.mark.parametrize("error", [UsageError("a path is needed"), StorageError("the disk is full")], ids=repr)
def test_a_kv_cache_that_cannot_be_frozen(error: ThawError, both: Both, kv: Any, log: list[str], tmp_path: Path):
    kv.fails = error
    with pytest.raises(type(error), match=str(error)):
        both.park(kv=tmp_path / "cache.thawkv")
    assert awake(both.core) and log == ["KV freeze cache.thawkv False"], "it was not even paused"


@pytest.mark.parametrize("how", ["replaced", "gone", "damaged"])
def test_a_snapshot_that_changed_wakes_nothing(how: str, both: Both, snapshot: Path, driver: Driver, log: list[str]):
    found = both.park()
    kept = snapshot.with_name("kept")
    shutil.copy(snapshot, kept)
    if how == "replaced":
        thaw_vllm.freeze_model(torch.nn.Linear(4, 4), snapshot, force=True)
    elif how == "gone":
        snapshot.unlink()
    else:
        snapshot.write_bytes(kept.read_bytes()[:100])
    log.clear()
    with pytest.raises(MismatchError if how == "replaced" else ThawError, match=r"weights\.thaw"):
        both.wake(found)
    assert log == [] and driver.parked == [42] and both.core.model_executor.is_sleeping
    kept.replace(snapshot)
    assert both.wake(found).bytes == 10 and awake(both.core)


def test_a_driver_that_does_not_wake_it(both: Both, driver: Driver, log: list[str]):
    """Its core cannot answer; a second call tries again."""
    found = both.park()
    driver.refuses_to_wake = DeviceError("the GPU has no room for it")
    with pytest.raises(DeviceError, match="no room"):
        both.wake(found)
    assert "thaw_wake" not in log
    driver.refuses_to_wake = None
    assert both.wake(found).bytes == 10 and awake(both.core)


def test_a_second_wake_after_a_failure_in_the_core(both: Both, driver: Driver, log: list[str]):
    found = both.park()
    both.core.tells["thaw_wakeable"] = {"error": "StorageError", "message": "was there a moment ago"}
    with pytest.raises(StorageError):
        both.wake(found)
    del both.core.tells["thaw_wakeable"]
    log.clear()
    assert both.wake(found).bytes == 10 and log == ["driver wake [42]", "thaw_wake"], "one that runs counts as woken"


def test_waking_that_breaks_it(both: Both, kv: Any, log: list[str], tmp_path: Path):
    found = both.park(kv=tmp_path / "cache.thawkv")
    both.core.tells["thaw_fill"] = {"broken": "CorruptionError: a checksum"}
    with pytest.raises(BrokenEngineError, match="half-way, and has been closed: CorruptionError: a checksum"):
        both.wake(found)
    assert both.engine.closed and not any("restore" in one for one in log)


def test_one_that_sleeps_is_not_parked_again(both: Both, driver: Driver):
    found = both.park()
    driver.wake([42])
    with pytest.raises(UsageError, match="parked"):
        both.park()
    assert found.driver


def test_a_driver_that_keeps_what_it_refused(both: Both, driver: Driver, log: list[str]):
    """Nobody asks a process that may be locked: it would never answer."""
    driver.refuses = DeviceError("Not everything could be undone: process 42")
    driver.after_refusal = "locked"
    with pytest.raises(DeviceError, match="Not everything"):
        both.park()
    assert asked(log) == ["thaw_park", "driver park [42]"]


def test_running_requests_of_a_synchronous_engine(core: FakeCore, log: list[str]):
    core.scheduler.requests["one"] = object()
    for call in (lambda llm: parked.park(llm), lambda llm: api.swap_weights(llm, "new.thaw")):
        with pytest.raises(UsageError, match="requests are not finished"):
            call(FakeLLM(core, log))
    assert log == []


# --- Swaps ------------------------------------------------------------------------------------------------------------


def test_a_swap_of_a_synchronous_engine(core: FakeCore, log: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/tmp")
    llm: Any = FakeLLM(core, log)
    found = api.check_swap(llm, "new.thaw")
    assert found == api.Swappable(10, 3, "new-id")
    report = api.swap_weights(llm, "new.thaw", verify=False)
    assert (report.bytes, report.model, report.aborted, report.route) == (10, "new-id", 0, "mapped")
    assert core.filled_with == {"path": "/tmp/new.thaw", "contents": ["c1"], "verify": False}
    core.answer = ([], [])
    with pytest.raises(BrokenEngineError, match="has been closed: the canary was answered"):
        api.swap_weights(llm, "new.thaw")
    assert llm.closed


def soon(work: Callable[[FakeAsync], Coroutine[Any, Any, Any]], engine: FakeAsync) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(work(engine), 20)

    return asyncio.run(within())


async def ends_after(core: FakeCore, seconds: float) -> None:
    await asyncio.sleep(seconds)
    core.scheduler.requests.clear()


def test_requests_that_end_in_time(core: FakeCore, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        core.scheduler.requests["one"] = object()
        ending = asyncio.ensure_future(ends_after(core, 0.05))
        report = await api.swap_weights_async(engine, "new.thaw", deadline=10)  # type: ignore[arg-type]
        await ending
        assert report.aborted == 0

    soon(work, FakeAsync(core, log))
    assert log == ["thaw_swap_check", "pause wait", "thaw_swap", "reset mm", "thaw_swap_finish"]
    assert core.ended == set() and not core.paused and core.weights == "new"


def test_requests_that_do_not(core: FakeCore, log: list[str]):
    """They are ended, and not before their time is up."""

    async def work(engine: FakeAsync) -> None:
        core.scheduler.requests |= {"one": object(), "two": object()}
        start = time.monotonic()
        await api.swap_weights_async(engine, "new.thaw", deadline=0.1)  # type: ignore[arg-type]
        assert 0.1 <= time.monotonic() - start < 10
        await asyncio.sleep(0.02)  # the pause that was asked for ends, too

    soon(work, FakeAsync(core, log))
    assert log == ["thaw_swap_check", "pause wait", "thaw_swap", "reset mm", "thaw_swap_finish"]
    assert core.ended == {"one", "two"} and not core.paused


def test_requests_without_time(core: FakeCore, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        core.scheduler.requests["one"] = object()
        assert (await api.swap_weights_async(engine, "new.thaw", deadline=0)).aborted == 1  # type: ignore[arg-type]

    soon(work, FakeAsync(core, log))
    assert "pause wait" not in log and core.ended == {"one"} and not core.paused


def test_requests_that_come_meanwhile(core: FakeCore, log: list[str]):
    """Are ended and counted: they were meant for what the engine held before."""
    real = core.model_executor.collective_rpc

    def comes(method: str, args: tuple[Any, ...] = ()) -> Any:
        if method == "thaw_fill":
            core.scheduler.requests |= {"late": object()}
        return real(method, args)

    core.model_executor.collective_rpc = comes  # type: ignore[method-assign]
    core.ask = lambda *_: core.did("canary") or core.answer  # type: ignore[method-assign, func-returns-value]

    async def work(engine: FakeAsync) -> None:
        report = await api.swap_weights_async(engine, "new.thaw")  # type: ignore[arg-type]
        assert report.aborted == 1

    soon(work, FakeAsync(core, log))
    assert core.ended == {"late"}


def test_a_pause_that_fails_is_told(core: FakeCore, log: list[str]):
    engine = FakeAsync(core, log)
    engine.broken_pause = RuntimeError("engine core is dead")

    with pytest.raises(RuntimeError, match="is dead"):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw", deadline=5), engine)  # type: ignore[arg-type]
    assert "thaw_swap" not in log


@pytest.mark.parametrize("deadline", [-1, -0.001])
def test_a_deadline_in_the_past(deadline: float, core: FakeCore, log: list[str]):
    with pytest.raises(UsageError, match="deadline must be 0 or more"):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw", deadline=deadline), FakeAsync(core, log))  # type: ignore[arg-type]
    assert log == []


def test_a_swap_that_is_refused_pauses_nobody(core: FakeCore, log: list[str]):
    core.tells["thaw_swap_check"] = {"error": "MismatchError", "message": "holds config"}
    core.scheduler.requests["one"] = object()
    with pytest.raises(MismatchError):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw"), FakeAsync(core, log))  # type: ignore[arg-type]
    assert log == ["thaw_swap_check"] and core.scheduler.requests and not core.paused


def test_a_swap_that_fails_lets_others_go_on(core: FakeCore, log: list[str]):
    core.tells["thaw_fill"] = {"error": "MismatchError", "message": "another snapshot meanwhile"}
    with pytest.raises(MismatchError):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw"), FakeAsync(core, log))  # type: ignore[arg-type]
    assert log[-2:] == ["thaw_swap", "resume"] and awake(core)


@pytest.mark.parametrize("deadline", [0, 0.05])
def test_requests_that_are_left_go_on_after_a_refusal(deadline: float, core: FakeCore, log: list[str]):
    """Their time is up, and then the snapshot is another than it was: nothing is ended for nothing."""
    core.scheduler.requests["one"] = object()
    engine = FakeAsync(core, log)
    real = engine.pause_generation

    async def replaced(**options: Any) -> None:
        core.tells["thaw_swap_check"] = {"error": "MismatchError", "message": "holds config"}
        await real(**options)

    engine.pause_generation = replaced  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match="holds config"):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw", deadline=deadline), engine)  # type: ignore[arg-type]
    assert log[-1] == "resume" and awake(core) and set(core.scheduler.requests) == {"one"} and core.ended == set()


def test_a_swap_that_breaks_it_lets_nobody_in(core: FakeCore, log: list[str]):
    core.tells["thaw_fill"] = {"broken": "CorruptionError: a checksum"}
    engine = FakeAsync(core, log)
    with pytest.raises(BrokenEngineError):
        soon(lambda engine: api.swap_weights_async(engine, "new.thaw"), engine)  # type: ignore[arg-type]
    assert log[-1] == "thaw_swap" and core.paused and engine.closed


@pytest.mark.parametrize("at", ["thaw_swap_check", "pause wait", "thaw_swap", "thaw_swap_finish"])
def test_a_caller_that_is_cancelled(at: str, core: FakeCore, log: list[str]):
    """What has begun goes to its end; nobody is let in before."""

    async def work(engine: FakeAsync) -> None:
        let = asyncio.Event()
        if at == "pause wait":
            core.scheduler.requests["one"] = object()
        else:
            engine.until[at] = let
        call = asyncio.ensure_future(api.swap_weights_async(engine, "new.thaw", deadline=5))  # type: ignore[arg-type]
        while at not in log:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0.05)
        assert log[-1] == at and core.paused == (at != "thaw_swap_check"), "no sooner than it is done"
        let.set()
        core.scheduler.requests.clear()
        while log[-1] != "thaw_swap_finish" or core.paused:
            await asyncio.sleep(0.001)
        assert log.count("thaw_swap") == 1 and core.weights == "new"

    soon(work, FakeAsync(core, log))
    assert "resume" not in log and not core.paused


# --- Parking an asynchronous engine -----------------------------------------------------------------------------------


def test_parking_waits_for_requests(core: FakeCore, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        core.scheduler.requests["one"] = object()
        ending = asyncio.ensure_future(ends_after(core, 0.05))
        found = await parked.park_async(engine, deadline=10)  # type: ignore[arg-type]
        await ending
        assert found.aborted == 0
        core.scheduler.requests["meanwhile"] = object()
        assert (await parked.wake_async(engine, found)).aborted == 1  # type: ignore[arg-type]

    soon(work, FakeAsync(core, log))
    assert core.ended == {"meanwhile"} and awake(core)


def test_parking_ends_what_is_left(core: FakeCore, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        core.scheduler.requests["one"] = object()
        assert (await parked.park_async(engine, deadline=0.05)).aborted == 1  # type: ignore[arg-type]

    soon(work, FakeAsync(core, log))
    assert log[:2] == ["pause wait", "thaw_park"] and core.ended == {"one"}


@pytest.mark.parametrize("at", ["pause wait", "thaw_park"])
def test_a_caller_of_park_that_is_cancelled(at: str, core: FakeCore, driver: Driver, log: list[str]):
    """What has begun goes to its end; then it is woken, since nobody would know how to."""

    async def work(engine: FakeAsync) -> None:
        let = asyncio.Event()
        if at == "pause wait":
            core.scheduler.requests["one"] = object()
        else:
            engine.until[at] = let
        call = asyncio.ensure_future(parked.park_async(engine, deadline=5))  # type: ignore[arg-type]
        while at not in log:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        let.set()
        core.scheduler.requests.clear()
        while "thaw_wake" not in log or core.paused:
            await asyncio.sleep(0.001)

    soon(work, FakeAsync(core, log))
    assert awake(core) and log.index("driver park [42]") < log.index("driver wake [42]") and "resume" not in log


def test_a_caller_of_wake_that_is_cancelled(core: FakeCore, kv: Any, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        found = await parked.park_async(engine, kv="cache.thawkv")  # type: ignore[arg-type]
        engine.until["thaw_wake"] = let = asyncio.Event()
        call = asyncio.ensure_future(parked.wake_async(engine, found))  # type: ignore[arg-type]
        while "thaw_wake" not in log:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        let.set()
        while not (awake(core) and log[-1] == "KV restore cache.thawkv"):
            await asyncio.sleep(0.001)

    soon(work, FakeAsync(core, log))


def test_parking_with_a_deadline_in_the_past(core: FakeCore, log: list[str]):
    with pytest.raises(UsageError, match="deadline must be 0 or more"):
        soon(lambda engine: parked.park_async(engine, deadline=-1), FakeAsync(core, log))  # type: ignore[arg-type]
    assert log == [] and awake(core)


def test_the_loop_goes_on_while_the_driver_works(
    core: FakeCore, driver: Driver, log: list[str], monkeypatch: pytest.MonkeyPatch
):
    """It takes seconds, and a server has other engines to answer for."""
    moments: list[int] = []
    beats = 0
    for name in ("park", "wake"):
        real = getattr(driver, name)

        def slowly(*args: Any, _real: Any = real, **options: Any) -> None:
            before = beats
            time.sleep(0.2)
            moments.append(beats - before)
            _real(*args, **options)

        monkeypatch.setattr(driver, name, slowly)

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.005)

    async def work(engine: FakeAsync) -> None:
        beating = asyncio.ensure_future(beat())
        found = await parked.park_async(engine)  # type: ignore[arg-type]
        await parked.wake_async(engine, found)  # type: ignore[arg-type]
        beating.cancel()

    soon(work, FakeAsync(core, log))
    assert len(moments) == 2 and min(moments) >= 3


# --- Known to be wrong ------------------------------------------------------------------------------------------------


def test_a_park_that_fails_once_it_sleeps(both: Both, log: list[str]):
    both.core.tells["thaw_trim"] = {"error": "ThawError", "message": "unexpected RuntimeError: CUDA error"}
    with pytest.raises(ThawError, match="CUDA error"):
        both.park()
    assert both.core.paused or not both.core.model_executor.is_sleeping, "requests are let in, and its memory is away"
    assert awake(both.core), "park: 'the engine is awake'"


def test_kv_blocks_that_cannot_be_restored(both: Both, kv: Any, tmp_path: Path):
    """The engine answers without them."""
    found = both.park(kv=tmp_path / "cache.thawkv")
    kv.fails_to_restore = StorageError("no such file: cache.thawkv")
    report = both.wake(found)
    assert (report.blocks, report.lost) == (0, "no such file: cache.thawkv") and awake(both.core)


@pytest.mark.parametrize("call", [lambda e: api.swap_weights_async(e, "new.thaw"), lambda e: parked.park_async(e)])
def test_a_pause_of_somebody_elses_is_not_ended(call: Any, core: FakeCore, log: list[str]):
    async def work(engine: FakeAsync) -> None:
        core.paused = True
        with pytest.raises(UsageError, match="paused by somebody"):
            await call(engine)

    soon(work, FakeAsync(core, log))
    assert core.paused and "resume" not in log and not any(one.startswith("pause") for one in log)


def test_a_process_that_ends_while_the_driver_has_it(both: Both, snapshot: Path, driver: Driver):
    """Nothing brings it back, and the caller is told so."""
    driver.refuses = DeviceError("process 42 cannot be checkpointed: it has ended meanwhile, start it anew")
    driver.ended = [42]
    with pytest.raises(BrokenEngineError, match=r"has died meanwhile: process 42 .*start another one"):
        both.park(driver=True)
    assert both.engine.closed


def test_a_process_that_ends_while_it_is_parked(both: Both, snapshot: Path, driver: Driver):
    found = both.park()
    driver.refuses_to_wake, driver.ended = DeviceError("process 42 cannot be asked for its state"), [42]
    with pytest.raises(BrokenEngineError, match="has died meanwhile"):
        both.wake(found)
    assert both.engine.closed
