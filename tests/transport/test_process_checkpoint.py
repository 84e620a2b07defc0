import ctypes
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from thaw_vllm.errors import DeviceError, UnsupportedError, UsageError
from thaw_vllm.transport import process_checkpoint
from thaw_vllm.transport.process_checkpoint import PERMISSION, Libcuda, park, state, unsupported, wake

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
CALLS = ["Lock", "Checkpoint", "Restore", "Unlock", "GetState"]
INVALID, NO_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM, ILLEGAL_STATE = 1, 2, 3, 304, 401
NOT_READY, NOT_PERMITTED, NOT_SUPPORTED = 600, 800, 801

STEPS = {
    "lock": (RUNNING, LOCKED),
    "checkpoint": (LOCKED, CHECKPOINTED),
    "restore": (CHECKPOINTED, LOCKED),
    "unlock": (LOCKED, RUNNING),
}


class FakeDriver:
    """The driver's rules for a few made-up processes, since where tests run there is no GPU.

    Attributes:
        states: of each process; what is not there does not exist.
        refuse: ``(call, pid)``: the CUresult of such a call, which then does nothing.
        calls: ``(call, pid)`` of everything but questions, in the order of their ends.
        timeouts: milliseconds of each lock.
        during: ``(call, pid)``: called in the middle of such a call.
    """

    def __init__(self, *pids):
        self.states = dict.fromkeys(pids, RUNNING)
        self.refuse, self.during, self.calls, self.timeouts = {}, {}, [], []
        self.guard = threading.Lock()

    def _step(self, name, pid):
        self.during.get((name, pid), lambda: None)()
        with self.guard:
            self.calls.append((name, pid))
            if (name, pid) in self.refuse:
                return self.refuse[name, pid]
            if pid not in self.states:
                return INVALID
            before, after = STEPS[name]
            if self.states[pid] != before:
                return ILLEGAL_STATE
            self.states[pid] = after
            return 0

    def lock(self, pid, milliseconds):
        assert isinstance(milliseconds, int)
        self.timeouts.append(milliseconds)
        return self._step("lock", pid)

    def checkpoint(self, pid):
        return self._step("checkpoint", pid)

    def restore(self, pid):
        return self._step("restore", pid)

    def unlock(self, pid):
        return self._step("unlock", pid)

    def state(self, pid):
        if ("state", pid) in self.refuse:
            return self.refuse["state", pid], 0
        return (0, self.states[pid]) if pid in self.states else (INVALID, 0)

    def done(self, name):
        return [pid for call, pid in self.calls if call == name]


@pytest.fixture
def driver(no_leaks):
    return FakeDriver(7, 8, 9)


@pytest.fixture
def clock(monkeypatch):
    """``clock.now``: seconds; time passes only where a test lets it."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(process_checkpoint, "monotonic", lambda: made.now)
    return made


def parked(driver, *pids, timeout=30.0):
    park(pids, timeout=timeout, driver=driver)
    assert {driver.states[pid] for pid in pids} == {CHECKPOINTED}
    driver.calls.clear()


def refused(driver, *pids, timeout=30.0):
    """What parking says when it fails; by then nothing is locked or checkpointed."""
    with pytest.raises(DeviceError) as caught:
        park(pids, timeout=timeout, driver=driver)
    assert set(driver.states.values()) == {RUNNING}
    return str(caught.value)


class TestPark:
    def test_all_are_locked_before_any_is_checkpointed(self, driver):
        park([9, 7, 8], timeout=30, driver=driver)
        assert [name for name, _ in driver.calls] == ["lock"] * 3 + ["checkpoint"] * 3
        assert driver.done("lock") == [9, 7, 8] and sorted(driver.done("checkpoint")) == [7, 8, 9]
        assert set(driver.states.values()) == {CHECKPOINTED}

    def test_memory_of_all_moves_at_once(self, driver):
        together = threading.Barrier(3, timeout=60)
        driver.during = {("checkpoint", pid): together.wait for pid in (7, 8, 9)}
        park([7, 8, 9], timeout=30, driver=driver)
        assert set(driver.states.values()) == {CHECKPOINTED}

    def test_each_lock_has_what_is_left_of_the_time(self, driver, clock):
        def passes(seconds):
            clock.now += seconds

        driver.during = {("lock", 7): lambda: passes(10), ("lock", 8): lambda: passes(19.5)}
        park([7, 8, 9], timeout=30, driver=driver)
        assert driver.timeouts == [30_000, 20_000, 500]

    def test_no_lock_waits_for_ever(self, driver, clock):
        """0 would mean that."""
        driver.during["lock", 7] = lambda: setattr(clock, "now", clock.now + 29.99999)
        park([7, 8], timeout=30, driver=driver)
        assert driver.timeouts == [30_000, 1]

    def test_time_that_is_up(self, driver, clock):
        driver.during["lock", 7] = lambda: setattr(clock, "now", clock.now + 30)
        said = refused(driver, 7, 8, 9)
        assert driver.calls == [("lock", 7), ("unlock", 7)]
        assert "process 8 cannot be locked: CUDA_ERROR_NOT_READY" in said and "allow more time" in said

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 2**32 / 1000])
    def test_time_that_the_driver_cannot_take(self, driver, timeout):
        with pytest.raises(UsageError, match="timeout is"):
            park([7], timeout=timeout, driver=driver)
        assert driver.calls == []

    def test_longest_time(self, driver, clock):
        clock.now = 0.0
        park([7], timeout=(2**32 - 1) / 1000, driver=driver)
        assert 2**32 - 2 <= driver.timeouts[0] <= 2**32 - 1

    def test_second_cannot_be_locked(self, driver):
        driver.refuse["lock", 8] = NOT_READY
        said = refused(driver, 7, 8, 9)
        assert driver.calls == [("lock", 7), ("lock", 8), ("unlock", 7)]
        assert "process 8" in said and "process 7" not in said and "undone" not in said

    def test_second_cannot_be_checkpointed(self, driver):
        driver.refuse["checkpoint", 8] = NO_MEMORY
        said = refused(driver, 7, 8)
        assert Counter(driver.calls) == Counter(
            [(name, pid) for name in ("lock", "checkpoint", "unlock") for pid in (7, 8)] + [("restore", 7)]
        )
        assert driver.calls.index(("restore", 7)) < driver.calls.index(("unlock", 7))
        assert "process 8 cannot be checkpointed" in said and "host memory" in said and "process 7" not in said

    def test_each_that_cannot_be_checkpointed_is_named(self, driver):
        driver.refuse = {("checkpoint", 7): NO_MEMORY, ("checkpoint", 9): NOT_SUPPORTED}
        said = refused(driver, 7, 8, 9)
        assert "process 7 cannot" in said and "process 9 cannot" in said and "process 8" not in said

    def test_undoing_fails(self, driver):
        driver.refuse = {("checkpoint", 8): NO_MEMORY, ("restore", 7): NO_MEMORY, ("unlock", 9): OPERATING_SYSTEM}
        with pytest.raises(DeviceError) as caught:
            park([7, 8, 9], timeout=30, driver=driver)
        first, rest = str(caught.value).split(". Not everything could be undone: ")
        assert "process 8 cannot be checkpointed" in first
        for left in ("process 7 cannot be restored", "process 9 cannot be unlocked"):
            assert re.search(left + "[^.]*may be lost", rest)
        assert "process 8" not in rest and driver.states == {7: CHECKPOINTED, 8: RUNNING, 9: LOCKED}
        assert ("unlock", 7) not in driver.calls

    def test_checkpoint_loses_the_process(self, driver):
        driver.during["checkpoint", 8] = lambda: driver.states.update({8: FAILED})
        with pytest.raises(DeviceError, match=r"process 8 cannot be unlocked.*may be lost"):
            park([7, 8], timeout=30, driver=driver)
        assert driver.states[7] == RUNNING

    def test_failed_checkpoint_unlocks_by_itself(self, driver):
        """The driver does not say whether it does; a process that runs is not lost."""
        driver.during["checkpoint", 8] = lambda: driver.states.update({8: RUNNING})
        assert "undone" not in refused(driver, 7, 8)

    def test_parked_already(self, driver):
        parked(driver, 7, 8)
        park([8, 7], timeout=30, driver=driver)
        assert driver.calls == [] and driver.states[7] == driver.states[8] == CHECKPOINTED

    def test_one_is_parked_already(self, driver):
        """It is not this call that parked it, so it stays."""
        parked(driver, 8)
        with pytest.raises(DeviceError, match=r"process 8 cannot be locked: CUDA_ERROR_ILLEGAL_STATE"):
            park([7, 8], timeout=30, driver=driver)
        assert driver.states == {7: RUNNING, 8: CHECKPOINTED, 9: RUNNING}

    def test_named_twice(self, driver):
        park([7, 7], timeout=30, driver=driver)
        assert driver.calls == [("lock", 7), ("checkpoint", 7)]

    def test_nobody(self, driver):
        park([], timeout=30, driver=driver)
        wake([], driver=driver)
        assert driver.calls == []

    @pytest.mark.parametrize("call", ["lock", "checkpoint"])
    def test_driver_breaks(self, driver, call):
        def breaks():
            raise RuntimeError("broken")

        driver.during[call, 8] = breaks
        with pytest.raises(RuntimeError, match="broken"):
            park([7, 8, 9], timeout=30, driver=driver)
        assert set(driver.states.values()) == {RUNNING}

    @pytest.mark.parametrize("call", ["lock", "checkpoint"])
    def test_interrupted(self, driver, interruptible, call):
        """The call in flight ends; what it did is undone."""
        caught = threading.Event()

        def handler(*_):
            caught.set()
            raise KeyboardInterrupt

        def interrupts():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert caught.wait(60)
            assert stopped.wait(60)

        # The main thread says by this event that it has seen the interruption and waits for the call.
        stopped = threading.Event()
        real = process_checkpoint.crew

        def crew(body, workers):
            def told(stop):
                threading.Thread(target=lambda: (stop.wait(60), stopped.set()), name="test").start()
                body(stop)

            real(told, workers)

        signal.signal(signal.SIGINT, handler)
        driver.during[call, 7] = interrupts
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(process_checkpoint, "crew", crew)
            park([7, 8], timeout=30, driver=driver)
        assert set(driver.states.values()) == {RUNNING}
        assert (call, 7) in driver.calls and ("unlock", 7) in driver.calls
        assert call == "checkpoint" or driver.calls == [("lock", 7), ("unlock", 7)]


class TestWake:
    def test_all_are_restored_before_any_is_unlocked(self, driver):
        parked(driver, 7, 8, 9)
        together = threading.Barrier(3, timeout=60)
        driver.during = {("restore", pid): together.wait for pid in (7, 8, 9)}
        wake([7, 8, 9], driver=driver)
        assert [name for name, _ in driver.calls] == ["restore"] * 3 + ["unlock"] * 3
        assert set(driver.states.values()) == {RUNNING}

    def test_twice(self, driver):
        parked(driver, 7, 8)
        wake([7, 8, 7], driver=driver)
        driver.calls.clear()
        wake([7, 8], driver=driver)
        assert driver.calls == [] and set(driver.states.values()) == {RUNNING}

    def test_each_from_where_it_is(self, driver):
        driver.states = {7: CHECKPOINTED, 8: LOCKED, 9: RUNNING}
        wake([7, 8, 9], driver=driver)
        assert driver.calls[0] == ("restore", 7) and sorted(driver.calls[1:]) == [("unlock", 7), ("unlock", 8)]

    def test_one_fails_and_the_others_are_woken(self, driver):
        parked(driver, 7, 8, 9)
        driver.refuse["restore", 8] = NO_MEMORY
        with pytest.raises(DeviceError) as caught:
            wake([7, 8, 9], driver=driver)
        said = str(caught.value)
        assert "process 8 cannot be restored: CUDA_ERROR_OUT_OF_MEMORY" in said and "may be lost" in said
        assert "free GPU memory" in said and "process 7" not in said and "process 9" not in said
        assert driver.states == {7: RUNNING, 8: CHECKPOINTED, 9: RUNNING} and ("unlock", 8) not in driver.calls
        driver.refuse.clear()
        wake([7, 8, 9], driver=driver)
        assert set(driver.states.values()) == {RUNNING}

    def test_unlocking_fails(self, driver):
        parked(driver, 7, 8)
        driver.refuse["unlock", 7] = OPERATING_SYSTEM
        with pytest.raises(DeviceError, match=r"process 7 cannot be unlocked.*may be lost"):
            wake([7, 8], driver=driver)
        assert driver.states[8] == RUNNING

    def test_process_that_the_driver_has_lost(self, driver):
        parked(driver, 8)
        driver.states[7] = FAILED
        with pytest.raises(DeviceError, match=r"process 7 .*may be lost"):
            wake([7, 8], driver=driver)
        assert driver.states[8] == RUNNING

    def test_process_that_has_ended(self, driver):
        parked(driver, 7, 8)
        del driver.states[7]
        with pytest.raises(DeviceError, match=r"process 7 .*INVALID_VALUE.*may be lost"):
            wake([7, 8], driver=driver)
        assert driver.states[8] == RUNNING


class TestState:
    def test_names(self, driver):
        found = []
        for number in (RUNNING, LOCKED, CHECKPOINTED, FAILED):
            driver.states[7] = number
            found.append(state(7, driver=driver))
        assert found == ["running", "locked", "checkpointed", "failed"]

    def test_no_such_process(self, driver):
        with pytest.raises(DeviceError, match=r"process 6 .*no such process, or none that uses CUDA"):
            state(6, driver=driver)

    @pytest.mark.parametrize("number", [-1, 4])
    def test_state_of_a_later_driver(self, driver, number):
        driver.states[7] = number
        with pytest.raises(DeviceError, match=f"process 7 is in state {number}"):
            state(7, driver=driver)


@pytest.mark.parametrize(
    ("result", "name", "cure"),
    [
        (INVALID, "CUDA_ERROR_INVALID_VALUE", "pass its id as this process sees it"),
        (NO_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "free host memory"),
        (NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "nvidia-smi -pm 1"),
        (OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", PERMISSION),
        (ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "wake it, or end it"),
        (NOT_READY, "CUDA_ERROR_NOT_READY", "let its requests end first, or allow more time"),
        (NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", PERMISSION),
        (NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "use a later driver"),
        (999, "CUDA error 999", "the kernel's log"),
    ],
)
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_every_refusal_has_its_cure(driver, call, result, name, cure):
    driver.refuse[call, 7] = result
    assert re.fullmatch(rf"process 7 cannot be {call}(p|point)?ed: {name}, .*{re.escape(cure)}.*", refused(driver, 7))


class TestLibcuda:
    """How the library is found and called; a made-up one has the calls of FakeDriver."""

    @pytest.fixture
    def library(self, driver, monkeypatch):
        """The functions as C ones; ``library.arguments``: the bytes behind each second argument, None for NULL."""

        def function(name):
            def call(pid, pointer):
                if name == "GetState":
                    result, number = driver.state(pid)
                    ctypes.c_int.from_address(pointer).value = number
                    return result
                made.arguments.append((name, ctypes.string_at(pointer, 64) if pointer else None))
                if name == "Lock":
                    return driver.lock(pid, ctypes.c_uint.from_address(pointer).value)
                return getattr(driver, name.lower())(pid)

            return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(call)

        made = SimpleNamespace(arguments=[], **{f"cuCheckpointProcess{name}": function(name) for name in CALLS})
        monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": made}[name])
        return made

    def test_calls(self, driver, library, clock):
        assert unsupported() is None
        park([7], timeout=30)
        assert driver.states[7] == CHECKPOINTED and state(7) == "checkpointed"
        wake([7])
        assert state(7) == "running"
        locking = (30_000).to_bytes(4, "little") + bytes(60)
        assert library.arguments == [("Lock", locking), ("Checkpoint", None), ("Restore", None), ("Unlock", None)]
        assert ctypes.sizeof(process_checkpoint._LockArguments) == 64

    def test_error_of_the_driver(self, driver, library):
        driver.refuse["lock", 8] = NOT_PERMITTED
        with pytest.raises(DeviceError, match="process 8 cannot be locked: CUDA_ERROR_NOT_PERMITTED"):
            park([7, 8], timeout=30)
        assert driver.states[7] == RUNNING

    def test_no_driver(self):
        assert "cannot be loaded: libnothing.so.1" in unsupported("libnothing.so.1")
        assert unsupported("libnothing.so.1").endswith(process_checkpoint.DRIVER)
        with pytest.raises(UnsupportedError, match="libnothing"):
            Libcuda("libnothing.so.1")

    def test_old_driver(self):
        """A library that is there and has other functions."""
        assert "older than 570, libc.so.6 lacks cuCheckpointProcessLock" in unsupported("libc.so.6")
        assert unsupported("libc.so.6").endswith(process_checkpoint.DRIVER)

    @pytest.mark.parametrize("name", CALLS)
    def test_driver_that_lacks_one(self, library, name):
        delattr(library, f"cuCheckpointProcess{name}")
        assert f"lacks cuCheckpointProcess{name};" in unsupported()
        for call in (lambda: park([7], timeout=30), lambda: wake([7]), lambda: state(7)):
            with pytest.raises(UnsupportedError, match=name):
                call()


class TestEnded:
    """A driver that never comes back from a call whose process is killed."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setattr(process_checkpoint, "_GRACE", 0.2)

    @pytest.fixture
    def never(self):
        """Waited for in vain, until the test has ended."""
        event = threading.Event()
        yield event
        event.set()
        for thread in threading.enumerate():
            if thread.name.startswith("thaw-driver-"):
                thread.join()

    @pytest.fixture
    def child(self):
        with subprocess.Popen(["sleep", "600"]) as process:
            yield process
            process.kill()

    @pytest.mark.parametrize("name", ["lock", "checkpoint"])
    def test_while_it_is_parked(self, name, child, never):
        driver = FakeDriver(child.pid, 8)
        driver.during[name, child.pid] = lambda: (child.kill(), never.wait())
        with pytest.raises(DeviceError, match=f"process {child.pid} cannot be {name}ed: it has ended.*start it anew"):
            park([child.pid, 8], timeout=30, driver=driver)
        assert driver.states[8] == RUNNING, "the other one runs on"

    @pytest.mark.parametrize("name", ["restore", "unlock"])
    def test_while_it_is_woken(self, name, child, never):
        driver = FakeDriver(child.pid, 8)
        park([child.pid, 8], timeout=30, driver=driver)
        driver.during[name, child.pid] = lambda: (child.kill(), never.wait())
        with pytest.raises(DeviceError, match=f"process {child.pid} cannot be {name}e?d: it has ended"):
            wake([child.pid, 8], driver=driver)
        assert driver.states[8] == RUNNING

    def test_while_it_is_asked_for_its_state(self, child, never):
        driver = FakeDriver(child.pid)
        driver.state = lambda pid: (child.kill(), never.wait())
        with pytest.raises(DeviceError, match="it has ended"):
            state(child.pid, driver=driver)

    def test_one_that_lives_is_waited_for(self, child):
        driver = FakeDriver(child.pid)
        driver.during["checkpoint", child.pid] = lambda: time.sleep(0.6)
        park([child.pid], timeout=30, driver=driver)
        assert driver.states[child.pid] == CHECKPOINTED
