import _thread
import signal
import threading
import time

import pytest

from thaw_vllm.transport import parallel

pytestmark = pytest.mark.usefixtures("no_leaks")


class Failure(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_every_task_once(workers):
    seen, lock = [], threading.Lock()

    def work(task):
        with lock:
            seen.append(task)

    parallel.run(range(100), work, workers)
    assert sorted(seen) == list(range(100))
    if workers <= 1:
        assert seen == list(range(100))
    parallel.run([], work, workers)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("error", [Failure, SystemExit, KeyboardInterrupt])
def test_first_error_is_raised_and_stops_the_rest(workers, error):
    seen = []

    def work(task):
        seen.append(task)
        if task == 3:
            raise error(str(task))
        time.sleep(0.001)

    with pytest.raises(error, match="3"):
        parallel.run(range(1000), work, workers)
    assert len(seen) < 100


@pytest.mark.parametrize("workers", [1, 3])
def test_error_of_the_tasks_themselves_is_raised(workers):
    """Else the work would end early and look done."""

    def tasks():
        yield 1
        raise Failure("no more")

    with pytest.raises(Failure, match="no more"):
        parallel.run(tasks(), lambda task: None, workers)


def test_tasks_in_flight_end_before_the_error_is_raised():
    ended, started = [], threading.Event()

    def work(task):
        if task == 0:
            started.wait(10)
            raise Failure
        started.set()
        time.sleep(0.05)
        ended.append(task)

    with pytest.raises(Failure):
        parallel.run(range(2), work, 2)
    assert ended == [1]


def test_ctrl_c_waits_for_the_tasks_in_flight(interruptible):
    ended = []

    def work(task):
        if task == 0:
            _thread.interrupt_main()
        time.sleep(0.05)
        ended.append(task)

    with pytest.raises(KeyboardInterrupt):
        parallel.run(range(1000), work, 2)
    assert 1 <= len(ended) <= 8


def test_ctrl_c_ends_what_the_tasks_in_flight_wait_for(interruptible):
    gone = threading.Event()

    def work(task):
        if task == 0:
            _thread.interrupt_main()
        assert gone.wait(60)

    with pytest.raises(KeyboardInterrupt), parallel.interruptible(gone.set):
        parallel.run(range(1000), work, 2)
    gone.clear()
    with pytest.raises(KeyboardInterrupt):
        parallel.run(range(2), lambda task: _thread.interrupt_main() if task == 0 else None, 2)
    assert not gone.is_set(), "after it nobody is told any more"


def test_thread_that_cannot_be_started(monkeypatch):
    started = []
    start = threading.Thread.start

    def refuse(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        parallel.run(range(1000), lambda task: time.sleep(0.001), 5)
    assert not any(thread.is_alive() for thread in started)


def test_default_workers():
    assert 2 <= parallel.default_workers() <= 16


# --- crew and Shared --------------------------------------------------------------------------------------------------


def ctrl_c():
    """A real signal, which wakes the main thread up from waiting."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_crew_runs_at_once_and_the_caller_meanwhile():
    together, calls = threading.Barrier(4), []

    def body(stop):
        together.wait(10)
        assert not stop.is_set()

    def meanwhile():
        calls.append(threading.current_thread())
        if len(calls) == 1:
            together.wait(10)

    parallel.crew(body, 3, meanwhile)
    assert set(calls) == {threading.current_thread()}


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_crew_runs_each_once(workers):
    seen = []
    parallel.crew(lambda stop: seen.append(threading.current_thread().name), workers)
    assert sorted(seen) == [f"thaw-{number}" for number in range(workers)]


@pytest.mark.parametrize("meanwhile", [None, lambda: None])
@pytest.mark.parametrize("error", [Failure, SystemExit, KeyboardInterrupt])
def test_error_in_the_crew_tells_the_rest(error, meanwhile):
    ended, together = [], threading.Barrier(4)

    def body(stop):
        together.wait(10)
        if threading.current_thread().name == "thaw-1":
            raise error("first")
        assert stop.wait(10)
        ended.append(1)
        raise Failure("second")

    with pytest.raises(error, match="first"):
        parallel.crew(body, 4, meanwhile)
    assert len(ended) == 3


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_error_of_the_caller_waits_for_the_crew(error):
    ended, together = [], threading.Barrier(4)

    def body(stop):
        together.wait(10)
        assert stop.wait(10)
        time.sleep(0.02)
        ended.append(1)

    def meanwhile():
        together.wait(10)
        raise error("mine")

    with pytest.raises(error, match="mine"):
        parallel.crew(body, 3, meanwhile)
    assert len(ended) == 3


@pytest.mark.parametrize("meanwhile", [None, lambda: None])
def test_second_ctrl_c_waits_too(meanwhile, interruptible):
    """Memory that the threads write to is freed next."""
    ended, together = [], threading.Barrier(3)

    def body(stop):
        together.wait(10)
        if threading.current_thread().name == "thaw-0":
            ctrl_c()
            assert stop.wait(10)
            for _ in range(5):
                time.sleep(0.01)
                ctrl_c()
        assert stop.wait(10)
        time.sleep(0.05)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        parallel.crew(body, 3, meanwhile)
    assert len(ended) == 3


def test_thread_that_begins_after_the_end_does_nothing(monkeypatch):
    """Ctrl-C in ``start`` itself leaves a thread that is under way and that nobody can wait for yet."""
    begun, held, late = [], threading.Event(), []
    start = threading.Thread.start

    def interrupted(thread):
        if begun:
            real = thread._target
            late.append(threading.Thread(target=lambda: (held.wait(10), real())))
            start(late[0])
            raise KeyboardInterrupt
        begun.append(thread)
        start(thread)

    seen = []

    def body(stop):
        seen.append(threading.current_thread())
        assert stop.wait(10)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.crew(body, 2)
    held.set()
    late[0].join()
    assert seen == begun


def test_shared_gives_every_item_to_one():
    shared, seen, lock = parallel.Shared(iter(range(2000))), [], threading.Lock()

    def body(stop):
        for item in shared:
            with lock:
                seen.append(item)

    parallel.crew(body, 5)
    assert sorted(seen) == list(range(2000))
    assert list(shared) == []


def test_shared_takes_no_more_than_is_asked_for():
    taken = []
    shared = parallel.Shared(taken.append(number) or number for number in range(10))
    assert (next(shared), next(shared)) == (0, 1)
    assert taken == [0, 1]
