"""A store's lock for a task: the loop goes on while it waits, and no way out leaves it behind."""

import asyncio
import contextlib
import threading
import time

import pytest
from tests.sessions.locks import free, held

from thaw_vllm.errors import StorageError
from thaw_vllm.sessions.in_use import in_use


async def until(what):
    """Wait, ten seconds at most."""
    for _ in range(1000):
        if what():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to that")


def test_it_is_held_and_let_go(store):
    async def run():
        async with in_use(store), in_use(store):
            assert not free(store.directory)
        assert free(store.directory)
        async with in_use(store) as use:
            assert await use.thread(int, "8", base=16) == 8 and not free(store.directory)
            raise ValueError

    with pytest.raises(ValueError):
        asyncio.run(run())
    assert free(store.directory)


def test_trying_does_not_wait(store):
    with held(store):
        start = time.monotonic()
        assert store.try_use() is None and time.monotonic() - start < 5
    with store.use(), contextlib.closing(store.try_use()):
        assert not free(store.directory)
    assert free(store.directory)


def test_who_wants_to_be_alone_comes_first(store):
    """A store that is used all the time is collected all the same."""
    with store.use():
        done = threading.Event()
        thread = threading.Thread(target=lambda: [store.alone().__enter__(), done.set()])
        thread.daemon = True
        thread.start()
        for _ in range(1000):
            one = store.try_use()
            if one is None:
                break
            one.close()
            time.sleep(0.01)
        assert one is None and not done.is_set()
    assert done.wait(10)


def test_the_loop_goes_on_while_it_waits(store):
    async def run():
        with held(store):
            task = asyncio.create_task(one())
            turns, start = 0, time.monotonic()
            while time.monotonic() - start < 0.5:
                await asyncio.sleep(0.01)
                turns += 1
            assert turns > 10 and not task.done()
        assert await asyncio.wait_for(task, 10) == "used"

    async def one():
        async with in_use(store) as use:
            return await use.thread(lambda: "used")

    asyncio.run(run())
    assert free(store.directory)


def test_many_that_wait_take_no_threads(store):
    async def one():
        async with in_use(store):
            pass

    async def run():
        with held(store):
            tasks = [asyncio.create_task(one()) for _ in range(100)]
            await asyncio.sleep(0.3)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 10) == "free"
        await asyncio.wait_for(asyncio.gather(*tasks), 20)

    asyncio.run(run())
    assert free(store.directory)


def test_cancelled_while_it_waits(store):
    async def one():
        async with in_use(store):
            pytest.fail("somebody else is alone with it")

    async def run():
        with held(store):
            task = asyncio.create_task(one())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: free(store.directory))

    asyncio.run(run())


def test_cancelled_while_a_thread_takes_it(store, monkeypatch):
    """The thread has it only when nobody waits for it any more."""
    plain, begun, go = store.try_use, threading.Event(), threading.Event()

    def slow():
        begun.set()
        go.wait(60)
        return plain()

    monkeypatch.setattr(store, "try_use", slow)

    async def one():
        async with in_use(store):
            pytest.fail("it was cancelled before")

    async def run():
        task = asyncio.create_task(one())
        await until(begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(run())  # which waits for the thread
    assert free(store.directory)


@pytest.mark.parametrize("kind", ["thread", "engine"])
def test_cancelled_while_work_goes_on(store, kind):
    """What still works keeps the lock until it ends, and no longer."""
    begun, go = threading.Event(), threading.Event()

    def work():
        begun.set()
        go.wait(60)

    async def waiting():
        begun.set()
        await until(go.is_set)

    async def one():
        async with in_use(store) as use:
            await (use.thread(work) if kind == "thread" else use.outliving(waiting()))

    async def run():
        task = asyncio.create_task(one())
        await until(begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not free(store.directory)
        go.set()
        await until(lambda: free(store.directory))

    asyncio.run(run())


def test_a_lock_that_cannot_be_opened(store):
    store.directory.joinpath("lock.lock").mkdir()

    async def run():
        async with in_use(store):
            pass

    with pytest.raises(StorageError, match=r"lock\.lock"):
        asyncio.run(run())
    store.directory.joinpath("lock.lock").rmdir()
    assert free(store.directory)
