"""Forks over several engines: what one engine gives, in whatever order, however many of them die meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm import forks
from tests.engines.vllm.session_cuts import apart
from tests.engines.vllm.test_engine import freeze
from tests.engines.vllm.test_kv import ARGS, OTHER, engine
from tests.engines.vllm.test_sessions import DIVERSE
from tests.engines.vllm.test_swap import environment as swap_safe
from tests.zygote import running
from vllm import SamplingParams

from thaw_vllm import ForkPool
from thaw_vllm.engines.vllm.sessions.pool_places import PoolBranch, Round, Shared, Task
from thaw_vllm.errors import BrokenEngineError, StorageError, ThawError, UnsupportedError, UsageError
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.zygote import messages, processes

pytestmark = pytest.mark.vllm

ZYGOTE = None if os.environ.get("THAW_TEST_ANEW") == "1" else forks.NAME
PARAMS = SamplingParams(**DIVERSE)
LONG_ANSWER = SamplingParams(**DIVERSE | {"max_tokens": 250})


@pytest.fixture(scope="module")
def weights(checkpoints: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.thaw"
    freeze(checkpoints("tied"), path)
    return path


@pytest.fixture(scope="module")
def variables() -> Iterator[None]:
    with mock.patch.dict(os.environ, forks.environment(), clear=True):
        yield


@pytest.fixture(scope="module")
def pool(checkpoints: Callable, weights: Path, variables: None, tmp_path_factory: Any) -> Iterator[ForkPool]:
    folder = tmp_path_factory.mktemp("pool")
    options = {"workers": 2, "batch": 1, "store": folder / "store", "log_dir": folder, "zygote": ZYGOTE}
    with ForkPool(checkpoints("tied"), weights, **options, **ARGS) as found:
        yield found
    assert all(one["pid"] is None and one["state"] == "ended" for one in found.workers())


@pytest.fixture(scope="module")
def expected(checkpoints: Callable, weights: Path, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What one engine gives."""
    folder = tmp_path_factory.mktemp("one")
    step = {"do": "fork", "tokens": OTHER, "n": 5, "sampling": DIVERSE}
    (found,) = engine(folder, [step], model=str(checkpoints("tied")), snapshot=str(weights))
    return [one["answer"] for one in found]


def answers(branches: Any) -> list[dict[str, Any]]:
    found = sorted(branches, key=lambda one: one.number)
    assert [one.number for one in found] == [*range(len(found))]
    assert all(one.error is None for one in found), [one.error for one in found]
    steps = [[sorted([token, value] for token, value in at.items()) for at in one.logprobs] for one in found]
    return [{"tokens": [*one.token_ids], "logprobs": at} for one, at in zip(found, steps, strict=True)]


def alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """How many requests share a step changes roundings, so tokens may part where two were as good as tied."""
    return all(apart(theirs, ours, 0) is None for ours, theirs in zip(found, expected, strict=True))


def kept(pool: ForkPool) -> str:
    """The prompt as a session."""
    (branch,) = pool.fork(OTHER, 1, PARAMS, keep=True)
    assert branch.error is None and branch.parent is not None
    return branch.parent


def until(what: Callable[[], bool]) -> None:
    running.until(what, "the pool", 300)


def all_are(pool: ForkPool, state: str) -> bool:
    return all(one["state"] == state for one in pool.workers())


def core_of(pool: ForkPool, number: int) -> int:
    """The engine core of a worker, which its log names."""
    log = Path(pool._shared.logs or pool._shared.folder) / f"worker-{number}.log"
    return int(re.findall(r"EngineCore pid=(\d+)", log.read_text(errors="replace"))[-1])


@contextlib.contextmanager
def in_the_middle(pool: ForkPool, trunk: str, n: int, params: SamplingParams, **more: Any) -> Iterator[Any]:
    """A fork of a session; each engine has its share, and stands still meanwhile, so that none can have ended it."""
    until(lambda: all_are(pool, "ready"))
    cores = [core_of(pool, one["number"]) for one in pool.workers()]
    processes.send_all(cores, signal.SIGSTOP)
    try:
        branches = pool.fork(trunk, n, params, **more)
        until(lambda: all_are(pool, "busy"))
        yield branches
    finally:
        processes.send_all(cores, signal.SIGCONT)


def test_a_prompt(pool: ForkPool, expected: list[dict[str, Any]]):
    found = [*pool.fork(OTHER, 5, PARAMS)]
    assert alike(answers(found), expected)
    assert {one.cached for one in found} == {192}
    assert all(one.finish_reason == "length" and one.session is None for one in found)
    assert len({one.parent for one in found}) == 1 and pool.store.listed()[0] == [], "it was kept for them alone"
    assert {len(one.token_ids) for one in pool.fork(OTHER, 2)} <= {*range(1, 17)}, "vLLM's defaults"


def test_a_session_and_its_branches(pool: ForkPool, expected: list[dict[str, Any]]):
    trunk = kept(pool)
    names = [f"b{number}" for number in range(5)]
    with in_the_middle(pool, trunk, 5, PARAMS, keep=True, labels=names) as branches:
        pass  # else the first engine may have done both shares before the second is awake
    found = [*branches]
    assert alike(answers(found), expected) and {one.worker for one in found} == {0, 1}
    for one in found:
        session = pool.store.read(one.session)
        assert (session.head.parent, session.head.fork, session.head.labels) == (trunk, 200, (names[one.number],))
        assert session.tokens[200:].tolist() == [*one.token_ids] and session.head.sampling["seed"] == 11 + one.number
    appended = [*pool.fork(trunk, 3, SamplingParams(temperature=0, max_tokens=2), append=[[5], [6, 7], [8]])]
    assert [len(one.token_ids) for one in appended] == [2] * 3 and {one.error for one in appended} == {None}
    assert fsck(pool.store).sound


def test_what_is_kept_for_a_time(pool: ForkPool):
    """The beginning of a round that keeps its branches, too."""
    (found,) = pool.fork([*OTHER, 5], 1, PARAMS, keep=True, ttl=3600)
    heads = [pool.store.read(id_).head for id_ in (found.parent, found.session)]
    assert [round(head.expires - head.created, 3) for head in heads] == [3600, 3600]


def test_rounds_of_a_benchmark(pool: ForkPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``thaw bench fork``'s, with these engines in place of new ones."""
    from thaw_vllm.bench import fork_task

    monkeypatch.setattr(fork_task, "import_vllm", lambda sockets: None)  # it sets variables, for good
    monkeypatch.setattr("thaw_vllm.engines.vllm.sessions.pool.ForkPool", lambda *_, **__: nullcontext(pool))
    asked: dict[str, Any] = {"model": "m", "snapshot": "w.thaw", "workers": 2, "engine_args": {}, "runs": 2}
    steps = fork_task.pooled(asked | {"tokens": [200, 100], "vocabulary": 500, "sockets": str(tmp_path)})
    for _ in range(3):
        next(steps)
    with pytest.raises(StopIteration) as end:
        next(steps)
    found = end.value.value
    assert found["shared"] is False and found["mib"] is None and len(found["lengths"]) == 2
    for one in found["lengths"]:
        assert len(one["round"]) == 2 and all(len(tokens) == 64 for made in one["tokens"] for tokens in made)
        assert [len(made) for made in one["tokens"]] == [4] * 2


def test_its_own_parameters(pool: ForkPool):
    """Of a session, less what it has generated."""
    found = [*pool.fork(OTHER, 1, SamplingParams(**DIVERSE), keep=True, labels=["own"])]
    assert found[0].error is None
    from thaw_vllm.sessions.branch import branch

    cut = branch(pool.store, "own", 203)
    assert [len(one.token_ids) for one in pool.fork(cut, 2)] == [5, 5]


def test_rounds_overlap(pool: ForkPool, expected: list[dict[str, Any]]):
    async def one() -> list[Any]:
        return [branch async for branch in pool.fork_async(OTHER, 5, PARAMS)]

    async def work() -> list[list[Any]]:
        return await asyncio.gather(one(), one(), one())

    for found in asyncio.run(work()):
        assert alike(answers(found), expected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 2, "append": [[5]]}, "append has 1 entries for 2"),
        ({"n": 2, "labels": ["a", "b"]}, "pass keep=True"),
        ({"n": 2, "ttl": 60}, "pass keep=True"),
        ({"n": 2, "keep": True, "ttl": 0}, "ttl must be"),
        ({"n": 2, "sampling_params": SamplingParams(temperature=0)}, "are the same"),
        ({"n": 2, "sampling_params": SamplingParams(n=2)}, "n of fork says how many"),
        ({"n": 2, "beginning": "nobody"}, "there is no session 'nobody'"),
        ({"n": 2, "timeout": 0}, "timeout must be more than 0"),
        ({"n": 2, "timeout": float("nan")}, "timeout must be more than 0"),
        ({"n": 2, "append": [[5], [-1]]}, "token"),
        ({"n": 2, "keep": True, "labels": [b"x", b"y"]}, "label"),
    ],
)
def test_what_is_refused_before_anything_is_asked(pool: ForkPool, asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        pool.fork(**{"beginning": OTHER} | asked)
    assert pool._shared.tasks.empty()


@pytest.mark.parametrize(
    ("n", "workers", "batch", "shares"),
    [
        (1, 4, 1, [(0, 1)]),
        (5, 2, 1, [(0, 3), (3, 2)]),
        (4, 2, 8, [(0, 4)]),
        (8, 4, 8, [(0, 8)]),
        (9, 4, 8, [(0, 5), (5, 4)]),
        (100, 3, 8, [(0, 34), (34, 33), (67, 33)]),
    ],
)
def test_shares_of_a_round(n: int, workers: int, batch: int, shares: list[tuple[int, int]]):
    pool = ForkPool("model", "weights.thaw", workers=workers, batch=batch)
    asked: list[Task] = []
    with mock.patch.object(pool, "store", create=True), mock.patch.object(pool._shared, "put", asked.append):
        pool.store.find.return_value = "trunk"
        pool._begin(Round(1.0), "trunk", n, PARAMS, (), False, (), None)
    assert [(task.message["first"], task.message["count"]) for task in asked] == shares
    assert [number for task in asked for number in task.numbers] == [*range(n)]


def test_what_an_engine_refuses(pool: ForkPool):
    """Too many tokens for this model: each branch says so, and the engines go on."""
    with pytest.raises(ThawError, match=r"max_model_len|longer|length"):
        pool.fork([*range(5, 400)] * 2, 2, PARAMS)
    assert len([*pool.fork(OTHER, 2, PARAMS)]) == 2
    assert [one["starts"] for one in pool.workers()] == [1, 1]


def test_one_that_has_seen_enough(pool: ForkPool):
    branches = pool.fork(OTHER, 4, PARAMS)
    assert next(branches).error is None
    branches.close()
    assert len([*pool.fork(OTHER, 2, PARAMS)]) == 2


def test_what_is_taken_after_the_deadline():
    """It counts by when it was sent: this process may have waited for a processor meanwhile."""
    asked = {"workers": 1, "snapshot": None, "engine_args": {}}
    place = Shared(asked, None, None, 1.0, False, False).places[0]
    own = {"token_ids": [7], "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None, "cached": 0}
    branch = own | {"parent": "trunk", "session": None, "error": None}
    task = Task({"do": "fork", "session": "trunk"}, Round(timeout=1e-9), [0, 1, 2])
    place._child._connection, engine = socket.socketpair()
    with place._child._connection, engine:
        for number, seconds in ((1, 0), (0, 900), (2, 900)):
            messages.send(engine, {"branch": branch | {"number": number}, "at": time.monotonic() + seconds})
        assert not place._does(task), "the engine is replaced"
    found = [task.round.ended.get_nowait() for _ in range(3)]
    assert found[0] == PoolBranch(1, 0, (7,), finish_reason="length", parent="trunk")
    assert [(one.number, "it was not there within" in str(one.error)) for one in found[1:]] == [(0, True), (2, True)]


class TestFaults:
    @pytest.mark.parametrize("alone", [False, True], ids=["all", "core"])
    def test_an_engine_that_dies_in_the_middle(self, alone: bool, pool: ForkPool, expected: list[dict[str, Any]]):
        """With all of its processes, or its core alone, as where memory runs out."""
        before = sum(one["starts"] for one in pool.workers())
        with in_the_middle(pool, kept(pool), 4, LONG_ANSWER) as branches:
            pid = pool.workers()[0]["pid"]
            processes.send_all([core_of(pool, 0)] if alone else processes.of_group(pid), signal.SIGKILL)
        made = answers(branches)
        assert [len(one["tokens"]) for one in made] == [250] * 4
        short = [{name: values[:8] for name, values in one.items()} for one in made]
        assert alike(short, expected[:4])
        until(lambda: all_are(pool, "ready"))
        assert sum(one["starts"] for one in pool.workers()) == before + 1
        assert alike(answers(pool.fork(OTHER, 4, PARAMS)), expected[:4])

    @pytest.mark.parametrize("alone", [False, True], ids=["all", "core"])
    def test_one_that_dies_idle(self, alone: bool, pool: ForkPool):
        until(lambda: all_are(pool, "ready"))
        before = pool.workers()[1]
        if alone:
            os.kill(core_of(pool, 1), signal.SIGKILL)
        else:
            os.killpg(before["pid"], signal.SIGKILL)
        until(lambda: pool.workers()[1]["starts"] == before["starts"] + 1 and pool.workers()[1]["state"] == "ready")
        assert len(answers(pool.fork(OTHER, 4, PARAMS))) == 4

    def test_one_that_takes_too_long(self, pool: ForkPool, expected: list[dict[str, Any]]):
        trunk = kept(pool)
        until(lambda: all_are(pool, "ready"))
        starts = sum(one["starts"] for one in pool.workers())
        found = [*pool.fork(trunk, 4, LONG_ANSWER, timeout=0.05)]
        assert sorted(one.number for one in found) == [0, 1, 2, 3]
        assert {str(one.error) for one in found} == {"it was not there within 0.05 s; its engine is replaced"}
        assert alike(answers(pool.fork(trunk, 4, PARAMS)), expected[:4])
        until(lambda: all_are(pool, "ready"))
        assert sum(one["starts"] for one in pool.workers()) == starts + 2

    def test_weights_that_are_not_there(self, checkpoints: Callable, tmp_path: Path, variables: None):
        pool = ForkPool(checkpoints("tied"), tmp_path / "nowhere.thaw", workers=2, zygote=ZYGOTE, **ARGS)
        with pytest.raises(StorageError, match=r"nowhere\.thaw"):
            pool.__enter__()
        assert all(one["pid"] is None for one in pool.workers())
        with pytest.raises(UsageError, match="not running"):
            pool.fork(OTHER, 2, PARAMS)

    def test_why_one_did_not_start(self, checkpoints: Callable, weights: Path, variables: None, tmp_path: Path):
        """Of this start: what an earlier one has left in the log says nothing."""
        (tmp_path / "worker-0.log").write_text("thaw_vllm.errors.StorageError: of yesterday\n")
        more = ARGS | {"tensor_parallel_size": 64}
        pool = ForkPool(checkpoints("tied"), weights, workers=1, zygote=ZYGOTE, log_dir=tmp_path, **more)
        with pytest.raises(ThawError) as found:
            pool.__enter__()
        assert "yesterday" not in str(found.value) and "root cause above" not in str(found.value)

    def test_closed_while_they_start(self, checkpoints: Callable, weights: Path, variables: None):
        pool = ForkPool(checkpoints("tied"), weights, workers=3, zygote=ZYGOTE, **ARGS)

        def close() -> None:
            until(lambda: pool.workers()[0]["pid"] is not None)
            pool.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        with pytest.raises(BrokenEngineError, match="was closed"):
            pool.__enter__()
        closing.join()
        assert [one["starts"] for one in pool.workers()] == [1, 0, 0] and pool.workers()[0]["pid"] is None

    def test_closed_in_the_middle(self, checkpoints: Callable, weights: Path, variables: None):
        """With a store of its own, which goes with it."""
        with ForkPool(checkpoints("tied"), weights, workers=1, zygote=ZYGOTE, **ARGS) as pool:
            directory = pool.store.directory
            closing = threading.Thread(target=pool.close)
            with in_the_middle(pool, kept(pool), 2, LONG_ANSWER) as branches:
                closing.start()
                assert ["was closed" in str(one.error) for one in branches] == [True] * 2
            closing.join()
        assert not directory.exists() and pool.workers()[0]["pid"] is None


@pytest.fixture(scope="module")
def frozen(smollm2: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.thaw"
    freeze(smollm2, path)
    return path


class TestOneCopyOfTheWeights:
    """Which a process of its own holds; on the CPU in the host's memory, in vLLM's build less its repacking."""

    @pytest.fixture
    def unpacked(self) -> Iterator[None]:
        with mock.patch.dict(os.environ, forks.environment(swap_safe()), clear=True):
            yield

    def options(self, folder: Path, **more: Any) -> dict[str, Any]:
        own = {"workers": 2, "batch": 1, "log_dir": folder, "zygote": ZYGOTE}
        return {**ARGS, "gpu_memory_utilization": 0.12} | own | more

    def test_answers_are_the_same_and_nobody_writes(
        self, smollm2: Path, frozen: Path, unpacked: None, tmp_path: Path, tmp_path_factory: Any
    ):
        with ForkPool(smollm2, frozen, **self.options(tmp_path, workers=1, share_weights=False)) as pool:
            own = answers(pool.fork(OTHER, 3, PARAMS))
            assert pool.weights_pid is None
        folder = tmp_path_factory.mktemp("shared")
        with ForkPool(smollm2, frozen, **self.options(folder, share_weights=True)) as pool:
            assert alike(answers(pool.fork(OTHER, 3, PARAMS)), own)
            for number in (0, 1):
                log = (folder / f"worker-{number}.log").read_text()
                mapped = shared_mapping(int(re.findall(r"pid=(\d+)\).* GB of another process", log)[-1]))
                assert mapped["Rss"] > 200_000 and mapped["Private_Dirty"] == 0, mapped
            holder = pool.weights_pid
            assert holder is not None
            os.kill(holder, signal.SIGKILL)
            until(lambda: all(one["starts"] > 1 for one in pool.workers()))
            until(lambda: {one["state"] for one in pool.workers()} == {"ready"})
            assert pool.weights_pid not in (None, holder)
            assert alike(answers(pool.fork(OTHER, 3, PARAMS)), own)
            holder = pool.weights_pid
        assert not running.alive(holder)

    def test_an_engine_that_would_write_has_its_own(
        self, checkpoints: Callable, weights: Path, variables: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """vLLM's CPU build repacks weights. Unless sharing is insisted on, each engine gets its own; that is said."""
        pool = ForkPool(checkpoints("tied"), weights, **self.options(tmp_path, share_weights=True))
        with pytest.raises(UnsupportedError, match="repacks weights"):
            pool.__enter__()
        assert pool.weights_pid is None
        pool = ForkPool(checkpoints("tied"), weights, **self.options(tmp_path))
        assert not pool._shared.weights.asked, "there is no GPU here"
        pool._shared.weights.asked = True
        with pool:
            assert len(answers(pool.fork(OTHER, 2, PARAMS))) == 2 and pool.weights_pid is None
            assert sum(one["starts"] for one in pool.workers()) in (3, 4)
        assert caplog.text.count("has weights of its own") == 1


def shared_mapping(pid: int) -> dict[str, int]:
    """kB of what a process has mapped of the shared weights."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    begins = [number for number, line in enumerate(lines) if "memfd:thaw-weights" in line]
    found: dict[str, int] = {}
    for begin in begins:
        for line in lines[begin + 1 : begin + 20]:
            if (told := re.fullmatch(r"(\w+): +(\d+) kB", line)) is not None:
                found[told[1]] = found.get(told[1], 0) + int(told[2])
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be"),
        ({"batch": 0}, "batch must be"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"start_timeout": -1}, "start_timeout must be"),
        ({"hf_overrides": {"f": print}}, "as JSON has them"),
        ({"snapshot": None}, "thaw id"),
        ({"model_id": "nothing"}, "model_id"),
        ({"share_weights": True, "snapshot": None, "model_id": f"tensors-blake3:{64 * '0'}"}, "come from a snapshot"),
        ({"share_weights": True, "tensor_parallel_size": 2}, "of one rank; leave tensor_parallel_size out"),
    ],
)
def test_pools_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises((UsageError, ThawError), match=message):
        ForkPool("model", **{"snapshot": "weights.thaw"} | options)


def test_a_pool_that_is_collected_in_one_of_its_threads():
    """Whatever that thread holds: it does not wait for itself."""
    pool = ForkPool("model", "weights.thaw", workers=2)
    place, weights = pool._shared.places[0], pool._shared.weights

    def work() -> None:
        with weights._lock:
            pool._end()

    place.thread = threading.Thread(target=work)
    place.thread.start()
    place.thread.join(60)
    assert not place.thread.is_alive()
    until(lambda: "thaw-fork-end" not in [one.name for one in threading.enumerate()])
