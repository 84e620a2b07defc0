"""Forks over several engines: what one engine gives, in whatever order, however many of them die meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from vllm import SamplingParams

from thaw_vllm import ForkPool
from thaw_vllm.errors import BrokenEngineError, StorageError, ThawError, UsageError
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store
from thaw_vllm.zygote import processes

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
    options = {"workers": 2, "store": folder / "store", "log_dir": folder, "zygote": ZYGOTE}
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


def test_a_prompt(pool: ForkPool, expected: list[dict[str, Any]]):
    found = [*pool.fork(OTHER, 5, PARAMS)]
    assert alike(answers(found), expected)
    assert {one.worker for one in found} == {0, 1} and {one.cached for one in found} == {192}
    assert all(one.finish_reason == "length" and one.session is None for one in found)


def test_a_session_and_its_branches(pool: ForkPool, expected: list[dict[str, Any]]):
    trunk = next(iter(pool.fork(OTHER, 1, PARAMS))).parent
    assert trunk is not None
    names = [f"b{number}" for number in range(5)]
    found = [*pool.fork(trunk, 5, PARAMS, keep=True, labels=names)]
    assert alike(answers(found), expected)
    for one in found:
        session = pool.store.read(one.session)
        assert (session.head.parent, session.head.fork, session.head.labels) == (trunk, 200, (names[one.number],))
        assert session.tokens[200:].tolist() == [*one.token_ids] and session.head.sampling["seed"] == 11 + one.number
    appended = [*pool.fork(trunk, 3, SamplingParams(temperature=0, max_tokens=2), append=[[5], [6, 7], [8]])]
    assert len(answers([*appended][:0])) == 0 and all(len(one.token_ids) == 2 for one in appended)
    assert fsck(pool.store).sound


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
        ({"n": 2, "sampling_params": SamplingParams(temperature=0)}, "are the same"),
        ({"n": 2, "sampling_params": SamplingParams(n=2)}, "n of fork says how many"),
        ({"n": 2, "beginning": "nobody"}, "there is no session 'nobody'"),
    ],
)
def test_what_is_refused_before_anything_is_asked(pool: ForkPool, asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        next(iter(pool.fork(**{"beginning": OTHER} | asked)))


def test_what_an_engine_refuses(pool: ForkPool):
    """Too many tokens for this model: each branch says so, and the engines go on."""
    with pytest.raises(ThawError, match=r"max_model_len|longer|length"):
        next(iter(pool.fork([*range(5, 400)] * 2, 2, PARAMS)))
    assert len([*pool.fork(OTHER, 2, PARAMS)]) == 2
    assert [one["starts"] for one in pool.workers()] == [1, 1]


def test_one_that_has_seen_enough(pool: ForkPool):
    branches = pool.fork(OTHER, 4, PARAMS)
    assert next(branches).error is None
    branches.close()
    assert len([*pool.fork(OTHER, 2, PARAMS)]) == 2


def until(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(0.02)


class TestFaults:
    def test_an_engine_that_dies_in_the_middle(self, pool: ForkPool, expected: list[dict[str, Any]]):
        found = []
        thread = threading.Thread(target=lambda: found.extend(pool.fork(OTHER, 4, LONG_ANSWER)))
        thread.start()
        until(lambda: all(one["state"] == "busy" for one in pool.workers()))
        pid = pool.workers()[0]["pid"]
        for process in processes.of_group(pid):
            os.kill(process, signal.SIGKILL)
        thread.join()
        made = answers(found)
        assert [len(one["tokens"]) for one in made] == [250] * 4
        short = [{name: values[:8] for name, values in one.items()} for one in made]
        assert alike(short, expected[:4])
        until(lambda: [one["state"] for one in pool.workers()] == ["ready", "ready"])
        assert sum(one["starts"] for one in pool.workers()) == 3
        assert alike(answers(pool.fork(OTHER, 4, PARAMS)), expected[:4])

    def test_one_that_dies_idle(self, pool: ForkPool):
        before = pool.workers()[1]
        os.killpg(before["pid"], signal.SIGKILL)
        until(lambda: pool.workers()[1]["starts"] == before["starts"] + 1 and pool.workers()[1]["state"] == "ready")
        assert len(answers(pool.fork(OTHER, 4, PARAMS))) == 4

    def test_one_that_takes_too_long(self, pool: ForkPool, expected: list[dict[str, Any]]):
        trunk = next(iter(pool.fork(OTHER, 1, PARAMS))).parent
        starts = sum(one["starts"] for one in pool.workers())
        found = [*pool.fork(trunk, 4, LONG_ANSWER, timeout=0.05)]
        assert sorted(one.number for one in found) == [0, 1, 2, 3]
        assert all("within 0.05 s; its engine is replaced" in str(one.error) for one in found)
        assert alike(answers(pool.fork(trunk, 4, PARAMS)), expected[:4])
        assert sum(one["starts"] for one in pool.workers()) == starts + 2

    def test_weights_that_are_not_there(self, checkpoints: Callable, tmp_path: Path, variables: None):
        pool = ForkPool(checkpoints("tied"), tmp_path / "nowhere.thaw", workers=2, zygote=ZYGOTE, **ARGS)
        with pytest.raises(StorageError, match=r"nowhere\.thaw"):
            pool.__enter__()
        assert all(one["pid"] is None for one in pool.workers())
        with pytest.raises(UsageError, match="not running"):
            next(iter(pool.fork(OTHER, 2, PARAMS)))

    def test_closed_in_the_middle(self, checkpoints: Callable, weights: Path, variables: None):
        """With a store of its own, which goes with it."""
        with ForkPool(checkpoints("tied"), weights, workers=1, zygote=ZYGOTE, **ARGS) as pool:
            directory = pool.store.directory
            branches = pool.fork(OTHER, 2, LONG_ANSWER)
            waiting = threading.Thread(target=lambda: found.extend(branches))
            found: list[Any] = []
            waiting.start()
            until(lambda: pool.workers()[0]["state"] == "busy" and Store(directory).records() != [])
            pool.close()
            waiting.join()
            assert len(found) == 2 and all(isinstance(one.error, BrokenEngineError) for one in found)
        assert not directory.exists() and pool.workers()[0]["pid"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be"),
        ({"timeout": 0}, "timeout must be"),
        ({"snapshot": None}, "thaw id"),
        ({"model_id": "nothing"}, "model_id"),
    ],
)
def test_pools_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises((UsageError, ThawError), match=message):
        ForkPool("model", **{"snapshot": "weights.thaw"} | options)
