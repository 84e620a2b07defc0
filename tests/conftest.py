"""Fixtures for every part of the tests. Loads neither torch nor an engine."""

import gc
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import hypothesis
import hypothesis.configuration
import pytest
from tests.soak import cases

hypothesis.configuration.set_hypothesis_home_dir(cases.ROOT / ".cache" / "hypothesis")
hypothesis.settings.register_profile("small", max_examples=cases.EXAMPLES["small"], deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", max_examples=cases.EXAMPLES["full"], deadline=None)
hypothesis.settings.load_profile("full" if cases.FULL else "small")

RUN = pytest.StashKey[cases.Run]()
MADE = pytest.StashKey[dict[str, tempfile.TemporaryDirectory]]()
DIRECTORIES = ("THAW_STATE_DIR", "THAW_CACHE_DIR")


def pytest_configure(config):
    config.stash[RUN], config.stash[MADE] = cases.Run(), {}
    for name in DIRECTORIES:  # no test makes an admin token, or keeps a snapshot, for whoever runs it
        if name not in os.environ:
            made = config.stash[MADE].setdefault(name, tempfile.TemporaryDirectory(prefix="thaw-tests-"))
            os.environ[name] = made.name


def pytest_unconfigure(config):
    for name, made in config.stash.get(MADE, {}).items():
        os.environ.pop(name, None)
        made.cleanup()


def pytest_report_header():
    numbers = "full" if cases.FULL else "small"
    return f"random cases: THAW_SEED={cases.SEED}, {numbers} numbers"


def pytest_sessionfinish(session):
    run = session.config.stash[RUN]
    if run.full and run.ran:
        with cases.RECORD.open("a") as record:
            record.write(json.dumps(run.record(session.testsfailed)) + "\n")


@pytest.fixture
def soak(request):
    """``for case in soak(small=…, full=…)``: this test's random cases; mark the test with ``pytest.mark.soak``."""

    def each(small, full):
        return request.config.stash[RUN].of(request.node.nodeid.removeprefix("tests/"), small, full)

    return each


def descriptors():
    """What each open descriptor of this process points to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed the directory
            continue
    return found


def our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("thaw-")}


@pytest.fixture
def no_leaks():
    """Fails the test when it leaves a descriptor or a thread of ours behind, however it went."""
    before = descriptors()
    yield
    until = time.monotonic() + 5
    while (left := our_threads()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left

    def new():
        return {number: target for number, target in descriptors().items() if before.get(number) != target}

    if new():  # perhaps of the test's own making, in a cycle; collecting takes long, so only now
        gc.collect()
    assert not new()


@pytest.fixture
def interruptible():
    """Ctrl-C reaches this test and the processes that it starts.

    A script's background jobs begin with SIGINT ignored, and so does everything that they start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def memory_path(tmp_path):
    """A directory in memory, where syncing costs nothing, for tests that write hundreds of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="thaw-test-", dir="/dev/shm") as place:
        yield Path(place)


@pytest.fixture
def parts():
    """``parts(directory)``: the hidden files that writers left in it."""
    return lambda directory: sorted(path.name for path in Path(directory).iterdir() if path.name.endswith(".thaw-part"))


@pytest.fixture
def driver(monkeypatch):
    """A made-up NVIDIA driver (tests/transport/driver.py), to which everything has been given back in the end."""
    from tests.transport.driver import OTHERS, Driver

    from thaw_vllm.transport import cuda

    made = Driver()
    made.current.context = OTHERS
    monkeypatch.setattr(cuda, "driver", lambda: made)
    yield made
    assert made.idle()
