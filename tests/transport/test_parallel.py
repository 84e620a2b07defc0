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


def test_ctrl_c_waits_for_the_tasks_in_flight():
    ended = []
    # Ignored where these tests run in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(task):
        if task == 0:
            _thread.interrupt_main()
        time.sleep(0.05)
        ended.append(task)

    try:
        with pytest.raises(KeyboardInterrupt):
            parallel.run(range(1000), work, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 <= len(ended) <= 8


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
