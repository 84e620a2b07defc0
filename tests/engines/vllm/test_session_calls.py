"""The asynchronous calls around a stand-in for the engine: the event loop goes on, and no way out keeps the lock."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.session_client import RUNNING, Client
from tests.sessions.locks import free, held
from tests.sessions.made import MODEL, context, resumes, save, session

from thaw_vllm.engines.vllm.sessions import api
from thaw_vllm.engines.vllm.sessions.api import checkpoint_async, restore_session_async
from thaw_vllm.engines.vllm.sessions.forking import require_agreement
from thaw_vllm.errors import ThawError, UnknownSessionError, UsageError
from thaw_vllm.sessions.store import Store


@pytest.fixture
def store(memory_path: Path) -> Store:
    return Store(memory_path / "sessions", create=True)


@pytest.fixture
def client() -> Client:
    return Client()


def saved(store: Store, *labels: str) -> str:
    return save(store, session(range(18), prompt=6, labels=labels, finished="stop"))[0]


CALLS: list[Callable[[Client, Store], Any]] = [
    lambda client, store: checkpoint_async(client, [*range(9)], store=store),
    lambda client, store: api.restore_session_async(client, "trunk", store=store),
    lambda client, store: api.checkout_async(client, "trunk", store=store, sampling_params=object()),
]


def test_what_is_kept_and_told(client: Client, store: Store):
    async def run() -> Any:
        first = await checkpoint_async(client, [*range(9)], store=store, labels=["trunk"], cache_salt="s")
        second = await checkpoint_async(client, "cmpl-1", store=str(store.directory), parent="trunk", model_id=MODEL)
        return first, second, await restore_session_async(client, second.session, store=store, evict=True)

    first, second, (report, whole) = asyncio.run(run())
    assert (first.tokens, first.blocks, first.added, first.bytes) == (9, 2, 2, 2 * context().page)
    assert resumes(store, first.session) and resumes(store, second.session)
    one, two = store.read(first.session), store.read(second.session)
    assert (one.head.prompt, one.head.salt, one.head.labels) == (9, "s", ("trunk",))
    assert (two.head.prompt, two.head.sampling, two.head.parent, two.head.fork) == (6, {"seed": 7}, first.session, 0)
    assert two.tokens.tolist() == whole.tokens.tolist() == RUNNING
    assert (report.session, report.tokens, report.cached, report.blocks, report.lost) == (second.session, 11, 8, 2, 0)
    asked = [options for _, options in client.asked]
    assert [one["model"] for one in asked] == [None, MODEL, None] and asked[-1]["evict"] is True


@pytest.mark.parametrize("call", CALLS)
def test_the_loop_goes_on_while_a_store_is_collected(client: Client, store: Store, call: Any):
    saved(store, "trunk")

    async def run() -> None:
        with held(store):
            task = asyncio.create_task(call(client, store))
            turns, start = 0, time.monotonic()
            while time.monotonic() - start < 0.5:
                await asyncio.sleep(0.01)
                turns += 1
            assert turns > 10 and not task.done() and client.asked == []
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert len(client.asked) == 1 and free(store.directory)


@pytest.mark.parametrize("call", CALLS)
def test_files_are_a_threads_work(client: Client, store: Store, call: Any, monkeypatch: pytest.MonkeyPatch):
    """Opened, read, locked, written and synced outside of the loop's own thread."""
    saved(store, "trunk")
    seen: list[str] = []

    def noted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def called(*given: Any, **options: Any) -> Any:
            if threading.get_ident() == loops:
                pytest.fail(f"{name} was called by the event loop's thread")
            seen.append(name)
            return plain(*given, **options)

        monkeypatch.setattr(owner, name, called)

    for name in ("__init__", "read", "find", "publish", "touch", "try_use"):
        noted(Store, name)
    noted(os, "fsync")
    loops = threading.get_ident()

    async def answer(method: str, options: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(asyncio.run, client._call(method, options))  # the engine is another process

    client.engine_core.call_utility_async = answer
    asyncio.run(call(client, str(store.directory)))
    own = {"publish", "fsync"} if call is CALLS[0] else {"find", "read", "touch"}
    assert own | {"__init__", "try_use"} <= set(seen)


@pytest.mark.parametrize("call", CALLS)
def test_cancelled_while_a_store_is_collected(client: Client, store: Store, call: Any):
    saved(store, "trunk")

    async def run() -> None:
        with held(store):
            task = asyncio.create_task(call(client, store))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert client.asked == [] and free(store.directory)


@pytest.mark.parametrize("call", CALLS)
def test_cancelled_while_the_engine_works(client: Client, store: Store, call: Any):
    """It keeps the lock until it has ended: blocks that it reads or writes are not collected."""
    saved(store, "trunk")
    known = {one.id for one in store.listed()[0]}

    async def run() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def works() -> None:
            begun.set()
            await go.wait()

        client.meanwhile = works
        task = asyncio.create_task(call(client, store))
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not free(store.directory)
        go.set()
        for _ in range(1000):
            if free(store.directory):
                return
            await asyncio.sleep(0.01)
        pytest.fail("the lock is still held")

    asyncio.run(run())
    assert {one.id for one in store.listed()[0]} == known  # whoever asked is gone, and nothing is published for him


@pytest.mark.parametrize("call", CALLS)
def test_an_engine_that_fails(client: Client, store: Store, call: Any):
    saved(store, "trunk")
    client.fault = {"error": "UnsupportedError", "message": "not in this version"}
    with pytest.raises(ThawError, match="not in this version"):
        asyncio.run(call(client, store))
    assert free(store.directory)


def test_a_time_to_live(client: Client, store: Store):
    report = asyncio.run(checkpoint_async(client, [*range(9)], store=store, ttl=7))
    head = store.read(report.session).head
    assert head.expires == report.expires == pytest.approx(head.created + 7, abs=1e-5)


@pytest.mark.parametrize("ttl", [0, -1, True, "7d", float("nan")])
def test_a_time_to_live_that_is_none(client: Client, store: Store, ttl: Any):
    with pytest.raises(UsageError, match="ttl must be a number of seconds"):
        asyncio.run(checkpoint_async(client, [1, 2], store=store, ttl=ttl))
    assert client.asked == []


def test_expired_ones_are_taken_up_until_they_are_removed(client: Client, store: Store):
    """One that goes between being named and being read is as one that was never there."""
    expired = save(store, session(range(18), labels=("trunk",), expires=9.0))[0]
    report, _ = asyncio.run(restore_session_async(client, "trunk", store=store))
    assert (report.session, report.lost) == (expired, 0)

    async def late() -> None:
        with held(store):
            task = asyncio.create_task(restore_session_async(client, "trunk", store=store))
            await asyncio.sleep(0.2)
            store.remove(expired)
        await asyncio.wait_for(task, 10)

    with pytest.raises(UnknownSessionError, match="there is no session"):
        asyncio.run(late())
    assert free(store.directory)


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"keep": True, "ttl": 0}, "ttl must be"), ({"keep": False, "ttl": 5}, "ttl is of sessions that are kept")],
)
def test_a_time_to_live_of_branches(asked: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        require_agreement(2, (), (), **asked)


@pytest.mark.parametrize("labels", [[""], ["a\n"], ["x" * 201], ["x"] * 65, "text"])
def test_labels_are_checked_before_the_engine_is_asked(client: Client, store: Store, labels: Any):
    with pytest.raises(UsageError, match="label"):
        asyncio.run(checkpoint_async(client, [1, 2], store=store, labels=labels))
    assert client.asked == [] and store.listed() == ([], {})


def test_a_parent_that_is_forgotten_meanwhile(client: Client, store: Store):
    parent = saved(store, "trunk")

    async def forget() -> None:
        store.remove(parent)

    client.meanwhile = forget
    report = asyncio.run(checkpoint_async(client, [*range(12)], store=store, parent="trunk"))
    head = store.read(report.session).head
    assert (head.parent, head.fork) == (parent, 12)
