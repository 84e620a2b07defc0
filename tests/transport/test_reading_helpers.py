"""Processes that read, and the thread that copies what they read; the GPU is made up (driver.py)."""

import _thread
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.transport.calls import in_child
from tests.transport.driver import OTHERS
from tests.transport.test_links import runs_of
from tests.transport.test_pipeline import LAYOUTS, Work

from thaw_vllm.errors import CorruptionError, DeviceError, StorageError
from thaw_vllm.transport import reading_helpers as helpers_
from thaw_vllm.transport.links import CudaLink
from thaw_vllm.transport.pipeline import deliver
from thaw_vllm.transport.plan import BLOCK
from thaw_vllm.transport.readers import Cached, Direct
from thaw_vllm.transport.reading_helpers import Helpers, wanted
from thaw_vllm.transport.source import FileSource, MemorySource

pytestmark = pytest.mark.usefixtures("no_leaks", "no_children")

ROOM = 4 * BLOCK


@pytest.fixture
def no_children():
    """Fails the test when a process that it started is still there, ended or not."""
    yield
    ending()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def ending():
    """Wait for helpers to end."""
    for thread in threading.enumerate():
        if thread.name == "thaw-helpers-end":
            thread.join()


@pytest.fixture(autouse=True)
def unmoved(driver):
    """The calling thread stays in the context that it was in."""
    yield
    assert driver.current.context == OTHERS


@pytest.fixture
def send(memory_path):
    """``send(work, before, **options)``: through three helpers; ``before`` is called with them and the source."""

    def sent(work, before=lambda helpers, source: None, count=3, **options):
        (memory_path / "source.bin").write_bytes(work.data)
        with (
            FileSource(memory_path / "source.bin") as source,
            Helpers(source, 0, count, slot=ROOM) as helpers,
            contextlib.closing(CudaLink(0, runs_of(work))) as link,
        ):
            before(helpers, source)
            reader = Cached(source, "tmpfs", "a test")
            return deliver(reader, "it", work.ranges, link, workers=2, helpers=helpers, **options)

    return sent


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "none"])
def test_every_byte_arrives(layout, verify, send, driver):
    work, counted = Work(LAYOUTS[layout]), []
    send(work, verify=verify, progress=counted.append)
    assert work.arrived()
    assert sum(counted) == work.total
    assert ("cuLaunchKernel" in driver.calls) == verify


def test_helpers_do_the_reading(send, monkeypatch):
    """Not this process, whose reads would be right as well."""
    work = Work([(0, 40 * ROOM)])
    monkeypatch.setattr(FileSource, "read_into", lambda *_: pytest.fail("read here"))
    assert send(work)
    assert work.arrived()


@pytest.mark.parametrize("seed", range(10))
def test_flipped_byte_is_found(seed, send):
    work, rng = Work(LAYOUTS["of every kind"]), random.Random(seed)
    hurt = rng.choice([found for found in work.ranges if found.length])
    work.data[hurt.offset + rng.randrange(hurt.length)] ^= 1 << rng.randrange(8)
    with pytest.raises(CorruptionError, match=f"checksum of {hurt.label} "):
        send(work)


@pytest.mark.parametrize("short", [1, ROOM, 3 * ROOM + 5])
def test_file_that_shrinks(short, send):
    work = Work([(0, 20 * ROOM)])
    end = len(work.data) - 999 - short  # a range beyond it ends where it begins
    with pytest.raises(CorruptionError, match=r"source.bin' ends at \d+, \d+ bytes were needed"):
        send(work, lambda helpers, source: os.truncate(source.path, end))


def test_device_that_fails(memory_path):
    """A directory, which cannot be read, in the place of the file."""

    class Failing(FileSource):
        @property
        def descriptor(self):
            return directory

    work = Work([(0, 20 * ROOM)])
    (memory_path / "source.bin").write_bytes(work.data)
    directory = os.open(memory_path, os.O_RDONLY)
    try:
        with (
            Failing(memory_path / "source.bin") as source,
            Helpers(source, 0, 3, slot=ROOM) as helpers,
            contextlib.closing(CudaLink(0, runs_of(work))) as link,
            pytest.raises(StorageError, match=r"reading '.*source.bin' at \d+ failed: Is a directory"),
        ):
            deliver(Cached(source, "tmpfs", "a test"), "it", work.ranges, link, workers=2, helpers=helpers)
    finally:
        os.close(directory)


def kill(helpers, number):
    for process in helpers._processes[:number]:
        signal.pidfd_send_signal(process, signal.SIGKILL)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before", "between"])
def test_helpers_that_are_killed(number, moment, send):
    """The rest do what they would have done, and threads when none is left."""
    work, known, counted = Work([(0, 300 * ROOM), (5, 3), (0, ROOM)]), [], []

    def before(helpers, source):
        known.append(helpers)
        if moment == "before":
            kill(helpers, number)

    def progress(count):
        if moment == "between" and not counted:
            kill(known[0], number)
        counted.append(count)

    send(work, before, progress=progress)
    assert work.arrived()
    assert sum(counted) == work.total


def test_helpers_that_do_not_start(send, monkeypatch):
    """As an interpreter that needs variables of its environment: threads do all of it."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    work = Work([(0, 30 * ROOM)])
    assert not send(work)
    assert work.arrived()


def test_no_process_can_be_started(memory_path, monkeypatch):
    (memory_path / "source.bin").write_bytes(b"x")
    monkeypatch.setattr(sys, "executable", str(memory_path / "nothing"))
    with FileSource(memory_path / "source.bin") as source, pytest.raises(FileNotFoundError):
        Helpers(source, 0, 3, slot=ROOM)


@pytest.mark.parametrize("error", [StorageError("device"), KeyboardInterrupt()])
def test_what_is_under_way_is_waited_for_after_an_error(error, send, driver):
    def progress(count):
        raise error

    with pytest.raises(type(error)):
        send(Work([(0, ROOM)] * 400), progress=progress)
    ending()
    assert driver.idle()


def test_ctrl_c(send, driver, interruptible):
    work = Work([(0, 400 * ROOM)])
    timer = threading.Timer(0.05, _thread.interrupt_main)

    def before(helpers, source):
        real = helpers.helpers[0].give
        calls = []

        def slowly(offset, length):
            if not calls:
                timer.start()
            calls.append(offset)
            time.sleep(0.02)
            real(offset, length)

        helpers.helpers[0].give = slowly

    with pytest.raises(KeyboardInterrupt):
        send(work, before)
    timer.join()
    ending()
    assert driver.idle()


CALLS = ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuStreamCreate", "cuEventCreate", "cuEventRecord"]
CALLS += ["cuEventQuery", "cuLaunchKernel", "cuMemAlloc_v2"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("call", CALLS)
def test_driver_that_refuses(call, number, send, driver):
    if number and call in ("cuLaunchKernel", "cuMemAlloc_v2"):
        pytest.skip("called once, or as luck has it")
    driver.refuse[call] = number
    with pytest.raises(DeviceError, match=f"CUDA's {call.partition('_')[0]} failed: CUDA_ERROR_MADE_UP"):
        send(Work([(0, ROOM)] * 60))
    ending()
    assert driver.idle()


@pytest.mark.parametrize("number", [0, 1, 5])
def test_memory_that_may_not_be_locked(number, send, driver):
    driver.refuse["cuMemHostRegister_v2"] = number
    work = Work([(0, ROOM)] * 60)
    send(work)
    assert work.arrived()


def test_helpers_end_with_their_parent(memory_path):
    """Killed without a word."""
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    told, tell = os.pipe()

    def work():
        source = FileSource(memory_path / "source.bin")
        made = Helpers(source, 0, 2, slot=ROOM)
        for found in made.helpers:
            found.give(0, ROOM)
        while not all(found.filled for found in made.helpers):
            time.sleep(0.001)
        os.write(tell, children().encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    numbers = [int(number) for number in os.read(told, 100).split()]
    os.close(told)
    os.close(tell)
    assert len(numbers) == 2
    until = time.monotonic() + 30
    while any(_runs(number) for number in numbers):
        assert time.monotonic() < until, "a helper lives on"
        time.sleep(0.01)


def children():
    """Numbers of the processes that this thread started."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


def _runs(number):
    try:
        return "helper.py" in Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return False


def test_helpers_hold_nothing_else_open(memory_path):
    """Neither this process's files, inheritable ones among them, nor its terminal."""
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    other = os.open(memory_path, os.O_RDONLY)
    os.set_inheritable(other, True)
    try:
        with FileSource(memory_path / "source.bin") as source, Helpers(source, 0, 1, slot=ROOM) as made:
            made.helpers[0].give(0, ROOM)
            while not made.helpers[0].filled:
                time.sleep(0.001)
            (number,) = children().split()
            held = {os.readlink(f"/proc/{number}/fd/{name}") for name in os.listdir(f"/proc/{number}/fd")}
            assert held == {"/memfd:thaw (deleted)", str(memory_path / "source.bin")}
            assert os.getpgid(int(number)) != os.getpgid(0)
    finally:
        os.close(other)


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(helpers_.platform, "machine", lambda: "x86_64")


def sparse(path, size):
    path.write_bytes(b"")
    os.truncate(path, size)
    return FileSource(path)


def test_when_helpers_are_worth_it(memory_path, sixteen, monkeypatch):
    with sparse(memory_path / "small", (1 << 30) - 1) as small, sparse(memory_path / "large", 1 << 30) as source:
        cached = Cached(source, "tmpfs", "a test")
        assert wanted(source, cached, None, 16) == 14
        assert wanted(source, cached, 3, 16) == 3
        assert wanted(small, cached, None, 16) == 0
        assert wanted(MemorySource(b""), cached, None, 16) == 0
        for name, value in {"frozen": True, "executable": "/opt/app", "nothing": None}.items():
            with monkeypatch.context() as patch:
                patch.setattr(sys, name, value, raising=False)
                assert wanted(source, cached, None, 16) == (14 if name == "nothing" else 0)
        with monkeypatch.context() as patch:
            patch.setattr(helpers_.platform, "machine", lambda: "aarch64")
            assert wanted(source, cached, None, 16) == 0
        assert wanted(source, cached, None, 7) == 0
        assert wanted(source, cached, None, 8) == 6


def test_direct_reads_stay_with_threads(tmp_path, sixteen):
    with sparse(tmp_path / "source.bin", 1 << 30) as source:
        try:
            direct = Direct(source, "a test", peek=True)
        except OSError as refused:
            pytest.skip(f"no direct I/O here: {refused.strerror}")
        with direct:
            assert wanted(source, direct, None, 16) == 0


def refusing(*_, **__):
    raise PermissionError(1, "Operation not permitted")


def test_kernel_without_process_descriptors(memory_path, sixteen, monkeypatch):
    helpers_._able.cache_clear()
    monkeypatch.setattr(os, "pidfd_open", refusing)
    with sparse(memory_path / "large", 1 << 30) as source:
        assert wanted(source, Cached(source, "tmpfs", "a test"), None, 16) == 0
        with pytest.raises(PermissionError):  # and nobody stays behind
            Helpers(source, 0, 2, slot=ROOM)
    helpers_._able.cache_clear()


@pytest.mark.parametrize("what", ["memfd_create", "ftruncate", "posix_spawn"])
def test_start_that_fails(what, memory_path, monkeypatch):
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    monkeypatch.setattr(os, what, refusing)
    with FileSource(memory_path / "source.bin") as source, pytest.raises(PermissionError):
        Helpers(source, 0, 2, slot=ROOM)


@pytest.mark.parametrize("allowed", [0, 1])
def test_threads_that_cannot_start(allowed, memory_path, monkeypatch, driver):
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    real, started = threading.Thread.start, []

    def start(thread):
        if thread.name.startswith("thaw-") and len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with FileSource(memory_path / "source.bin") as source, pytest.raises(RuntimeError, match="new thread"):
        Helpers(source, 0, 3, slot=ROOM)
    ending()
    assert driver.idle()


def test_context_that_cannot_be_entered(send, driver):
    work = Work([(0, 30 * ROOM)])
    driver.refuse["cuCtxSetCurrent"] = 0
    with contextlib.suppress(DeviceError):  # a thread that locks may be the first to try: then it works unlocked
        send(work)
        assert work.arrived()
    ending()
    assert driver.idle()


def test_script_that_ends_at_once(memory_path):
    """While helpers are being ended: nothing is printed, and the exit code is 0."""
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    script = f"""
from tests.transport.driver import Driver
from thaw_vllm.transport import cuda
made = Driver()
cuda.driver = lambda: made
from thaw_vllm.transport import reading_helpers as helpers
from thaw_vllm.transport.source import FileSource
source = FileSource({str(memory_path / "source.bin")!r})
helpers.Helpers(source, 0, 6, slot={ROOM}).close()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_admitting_is_for_threads(send):
    with pytest.raises(ValueError, match="by threads"):
        send(Work([(0, ROOM)]), admit=lambda number: True)
