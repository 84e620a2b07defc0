"""Processes that read, and the thread that copies what they read; the GPU is made up (driver.py)."""

import _thread
import contextlib
import os
import random
import signal
import socket
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
    before = children()
    yield
    ending()
    assert not children() - before


def children():
    """Of this process, those that have ended and were not waited for among them."""
    found = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            _, parent, *_ = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(int(entry))
    return found


def ending():
    """Wait for helpers to end."""
    while any(thread.name == "thaw-helpers-end" for thread in threading.enumerate()):
        time.sleep(0.002)


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
            Helpers(0, count, slot=ROOM) as helpers,
            contextlib.closing(CudaLink(0, runs_of(work))) as link,
        ):
            before(helpers, source)
            reader = Cached(source, "tmpfs", "a test")
            with helpers.reading(source):
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
            Helpers(0, 3, slot=ROOM) as helpers,
            contextlib.closing(CudaLink(0, runs_of(work))) as link,
            helpers.reading(source),
            pytest.raises(StorageError, match=r"reading '.*source.bin' at \d+ failed: Is a directory"),
        ):
            deliver(Cached(source, "tmpfs", "a test"), "it", work.ranges, link, workers=2, helpers=helpers)
    finally:
        os.close(directory)


def kill(helpers, number):
    for process in numbers(helpers)[:number]:
        os.kill(process, signal.SIGKILL)


def numbers(helpers):
    """Of their processes, the first one's first."""
    (first,) = (int(line.split()[1]) for line in descriptor(helpers._process) if line.startswith("Pid:"))
    until = time.monotonic() + 30
    while len(found := [first, *forked(first)]) < len(helpers.helpers):
        assert time.monotonic() < until, "they do not come up"
        time.sleep(0.001)
    return found


def descriptor(number):
    return Path(f"/proc/self/fdinfo/{number}").read_text().splitlines()


def forked(process):
    """By it, and by those."""
    try:
        own = [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # ended
        return []
    return own + [number for child in own for number in forked(child)]


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
    monkeypatch.setattr(sys, "executable", str(memory_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        Helpers(0, 3, slot=ROOM)


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


@pytest.mark.parametrize("idle", [True, False])
def test_helpers_end_with_their_parent(idle, memory_path):
    """Killed without a word."""
    (memory_path / "source.bin").write_bytes(bytes(ROOM))
    told, tell = os.pipe()

    def work():
        source = FileSource(memory_path / "source.bin")
        made = Helpers(0, 2, slot=ROOM)
        with contextlib.nullcontext() if idle else made.reading(source):
            for found in made.helpers:
                if not idle:
                    found.give(0, ROOM)
            while not (idle or all(found.filled for found in made.helpers)):
                time.sleep(0.001)
            os.write(tell, " ".join(map(str, numbers(made))).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    known = [int(number) for number in os.read(told, 100).split()]
    os.close(told)
    os.close(tell)
    assert len(known) == 2
    until = time.monotonic() + 30
    while any(_runs(number) for number in known):
        assert time.monotonic() < until, "a helper lives on"
        time.sleep(0.01)


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
        with FileSource(memory_path / "source.bin") as source, Helpers(0, 2, slot=ROOM) as made:
            with made.reading(source):
                for found in made.helpers:
                    found.give(0, ROOM)
                while not all(found.filled for found in made.helpers):
                    time.sleep(0.001)
                assert [opened(number)[0] for number in numbers(made)] == [str(memory_path / "source.bin")] * 2
            until = time.monotonic() + 30
            while any(opened(number)[0] != "/memfd:thaw (deleted)" for number in numbers(made)):
                assert time.monotonic() < until, "the file is held open between two deliveries"
            for number in numbers(made):
                memory, line = sorted(set(opened(number)))
                assert memory == "/memfd:thaw (deleted)" and line.startswith("socket:")
                assert os.getpgid(number) != os.getpgid(0)
    finally:
        os.close(other)


def opened(process):
    """What a process holds open."""
    found = []
    for name in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            found.append(os.readlink(f"/proc/{process}/fd/{name}"))
    return sorted(sorted(found), key=lambda name: name.startswith(("/memfd", "socket")))


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
    helpers_._calls.cache_clear()
    monkeypatch.setattr(os, "pidfd_open", refusing)
    with sparse(memory_path / "large", 1 << 30) as source:
        assert wanted(source, Cached(source, "tmpfs", "a test"), None, 16) == 0
    with pytest.raises(PermissionError):  # and nobody stays behind
        Helpers(0, 2, slot=ROOM)
    helpers_._calls.cache_clear()


@pytest.mark.parametrize("what", ["memfd_create", "ftruncate", "posix_spawn", "socketpair"])
def test_start_that_fails(what, monkeypatch):
    monkeypatch.setattr(helpers_.socket if what == "socketpair" else os, what, refusing)
    with pytest.raises(PermissionError):
        Helpers(0, 2, slot=ROOM)


@pytest.mark.parametrize("allowed", [0, 1])
def test_threads_that_cannot_start(allowed, monkeypatch, driver):
    real, started = threading.Thread.start, []

    def start(thread):
        if thread.name.startswith("thaw-") and len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        Helpers(0, 3, slot=ROOM)
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


def test_script_that_ends_at_once():
    """While helpers are being ended: nothing is printed, and the exit code is 0."""
    script = f"""
from tests.transport.driver import Driver
from thaw_vllm.transport import cuda
made = Driver()
cuda.driver = lambda: made
from thaw_vllm.transport import reading_helpers as helpers
helpers.Helpers(0, 6, slot={ROOM}).close()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_one_delivery_after_another(memory_path, driver):
    """Other files, other links, some ranges that nobody gave to anybody, by the same processes."""
    works = [Work([(0, 30 * ROOM)], seed=1), Work(LAYOUTS["of every kind"], seed=2), Work([(0, ROOM)], seed=3)]
    with Helpers(0, 3, slot=ROOM) as helpers:
        before = numbers(helpers)
        for number, work in enumerate(works):
            (memory_path / str(number)).write_bytes(work.data)
            with (
                FileSource(memory_path / str(number)) as source,
                contextlib.closing(CudaLink(0, runs_of(work))) as link,
                helpers.reading(source),
            ):
                reader = Cached(source, "tmpfs", "a test")
                assert deliver(reader, "it", work.ranges, link, workers=2, helpers=helpers)
            assert work.arrived()
            assert helpers.sound
        for number in range(300):  # over before a helper has looked, or even heard of it
            work = works[number % 2 * 2]
            with (
                FileSource(memory_path / str(number % 2 * 2)) as source,
                contextlib.closing(CudaLink(0, runs_of(work))) as link,
                helpers.reading(source),
            ):
                work.target.zero_()
                assert deliver(Cached(source, "tmpfs", "a test"), "it", work.ranges, link, workers=2, helpers=helpers)
            assert work.arrived()
        assert numbers(helpers) == before
        kill(helpers, 1)
        assert helpers.sound
    ending()
    assert not helpers.sound
    assert driver.idle()


def test_interrupt_while_helpers_are_told(memory_path):
    """Some know of the next file and some do not: of no more use."""
    (memory_path / "source.bin").write_bytes(bytes(ROOM))

    def interrupted(file):
        raise KeyboardInterrupt

    for what in ("begin", "finish"):
        with FileSource(memory_path / "source.bin") as source, Helpers(0, 2, slot=ROOM) as helpers:
            setattr(helpers.helpers[1], what, interrupted if what == "begin" else lambda: interrupted(None))
            with pytest.raises(KeyboardInterrupt), helpers.reading(source):
                pass
            assert not helpers.sound


def test_no_room_for_a_descriptor_on_its_way(send, monkeypatch):
    """The helper that got none is given up, and does not wait for ever."""
    real, told = helpers_.socket.send_fds, []

    def refusing_once(*arguments):
        told.append(arguments)
        if len(told) == 1:
            raise OSError(109, "Too many references: cannot splice")
        return real(*arguments)

    monkeypatch.setattr(helpers_.socket, "send_fds", refusing_once)
    work = Work([(0, 60 * ROOM)])
    assert send(work)
    assert work.arrived() and len(told) == 3


def test_default_timeout_of_sockets(memory_path, monkeypatch):
    socket.setdefaulttimeout(0.01)
    try:
        with Helpers(0, 2, slot=ROOM) as helpers:
            known = numbers(helpers)
            time.sleep(0.2)
            assert numbers(helpers) == known
    finally:
        socket.setdefaulttimeout(None)


def test_helpers_end_although_a_fork_holds_their_lines():
    helpers = Helpers(0, 3, slot=ROOM)
    known = numbers(helpers)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        helpers.close()
        ending()
        assert not any(_runs(number) for number in known)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_nobody_is_left_to_a_process_1_that_waits_for_nobody():
    """As in a container: whoever is orphaned becomes this process's child, and stays a zombie."""
    script = f"""
import ctypes, os, threading
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
from tests.transport.driver import Driver
from thaw_vllm.transport import cuda
made = Driver()
cuda.driver = lambda: made
from thaw_vllm.transport import reading_helpers as helpers
for _ in range(3):
    helpers.Helpers(0, 6, slot={ROOM}).close()
for thread in threading.enumerate():
    if thread.name == "thaw-helpers-end":
        thread.join()
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("none")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "none\n", "")
