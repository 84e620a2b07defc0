"""The CUDA state of other processes, out of the GPU into their own host memory and back, by NVIDIA's driver.

A parked process lives on, holds its GPU memory as host memory and nothing of the GPU, not even a context; whatever it
asks of CUDA waits until it is woken. The calling process never initialises CUDA.

Sources: "CUDA Driver API, checkpointing" (docs.nvidia.com/cuda/cuda-driver-api, group CUDA_CHECKPOINT) and the readme
of NVIDIA's cuda-checkpoint (github.com/NVIDIA/cuda-checkpoint). By them, driver 570 is the first with these calls; only
Linux has them; restoring needs persistence mode or a caller that has initialised CUDA; managed memory, and before
driver 610 memory shared by CUDA IPC, are not supported; after an error the driver does not attempt to keep a process in
a good state. Neither says which permission it takes. Root was seen to suffice; the capabilities in PERMISSION are those
that Linux asks for to trace and to restore other processes.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, Protocol, TypeVar, cast

from ..errors import DeviceError, UnsupportedError, UsageError
from ..zygote.processes import stat
from .cuda import INT, POINTER, UINT
from .parallel import crew, run

T = TypeVar("T")

PERMISSION = (
    "run as root; in a container, with CAP_CHECKPOINT_RESTORE and one of CAP_SYS_PTRACE and CAP_SYS_ADMIN, in the PID "
    "namespace of the process"
)
"""The cure where the driver may not."""

DRIVER = "use Linux with an NVIDIA driver of version 570 or later; in a container, give it the GPUs"
"""The cure where ``unsupported`` says why."""

_STATES = ("running", "locked", "checkpointed", "failed")
"""CUprocessState, by number."""

_LONGEST = 0xFFFFFFFF
"""Milliseconds: what CUcheckpointLockArgs has room for."""

_OUT_OF_MEMORY, _NOT_READY = 2, 600
_ENDED = -1
"""In place of a CUresult: the process has ended, and the driver did not come back."""

_GRACE = 2.0
"""Seconds that a call may take once its process has ended; whether the driver comes back then is not documented."""
_PERSISTENCE = "turn on persistence mode (nvidia-smi -pm 1), which restoring needs where nothing else holds the GPU"
_LOST = "its state may be lost: end it and start it anew"

_RESULTS = {
    _ENDED: ("it has ended meanwhile", "start it anew"),
    1: ("CUDA_ERROR_INVALID_VALUE", "no such process, or none that uses CUDA; pass its id as this process sees it"),
    _OUT_OF_MEMORY: (
        "CUDA_ERROR_OUT_OF_MEMORY",
        "the host has no room for its GPU memory; free host memory, or raise the container's limit",
    ),
    3: ("CUDA_ERROR_NOT_INITIALIZED", f"the driver is not ready; {_PERSISTENCE}"),
    304: (
        "CUDA_ERROR_OPERATING_SYSTEM",
        f"a system call of the driver failed, as where it may not reach the process; {PERMISSION}, "
        "and look into the kernel's log",
    ),
    401: (
        "CUDA_ERROR_ILLEGAL_STATE",
        "it is locked or checkpointed by somebody, or a checkpoint of it has failed; wake it, or end it",
    ),
    _NOT_READY: (
        "CUDA_ERROR_NOT_READY",
        "its work on the GPU was still running when the time was up; let its requests end first, or allow more time",
    ),
    800: ("CUDA_ERROR_NOT_PERMITTED", f"not permitted; {PERMISSION}; if that is so, {_PERSISTENCE}"),
    801: (
        "CUDA_ERROR_NOT_SUPPORTED",
        "the driver cannot do it for what this process uses, such as managed memory or memory shared by CUDA IPC; "
        "use a later driver, or do without those",
    ),
}
"""Name and cure of a CUresult."""

_NO_ROOM_TO_RESTORE = (
    "the GPU has no room for it; free GPU memory and wake it again, though driver 580 was seen to fail then, too "
    "(NVIDIA/cuda-checkpoint, issue 44)"
)


class Driver(Protocol):
    """The five calls, each giving its CUresult; called from several threads at once."""

    def lock(self, pid: int, milliseconds: int) -> int:
        """running to locked, when its work on the GPU is done; at most so long, 0 for ever."""

    def checkpoint(self, pid: int) -> int:
        """locked to checkpointed."""

    def restore(self, pid: int) -> int:
        """checkpointed to locked."""

    def unlock(self, pid: int) -> int:
        """locked to running."""

    def state(self, pid: int) -> tuple[int, int]:
        """CUresult, and CUprocessState."""


class _LockArguments(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = (("timeoutMs", UINT), ("reserved0", UINT), ("reserved1", ctypes.c_uint64 * 7))


_SIGNATURES: dict[str, list[Any]] = {
    "cuCheckpointProcessLock": [INT, POINTER],
    "cuCheckpointProcessCheckpoint": [INT, POINTER],
    "cuCheckpointProcessRestore": [INT, POINTER],
    "cuCheckpointProcessUnlock": [INT, POINTER],
    "cuCheckpointProcessGetState": [INT, POINTER],
}


class Libcuda:
    """The installed driver. All of its calls wait, so all release the interpreter lock (see cuda)."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        """
        Raises:
            UnsupportedError: there is no such library, or it lacks these calls.
        """
        try:
            loaded = ctypes.CDLL(library)
        except OSError as error:
            raise UnsupportedError(f"the NVIDIA driver cannot be loaded: {error}; {DRIVER}") from None
        self._functions: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(loaded, name, None)
            if function is None:
                raise UnsupportedError(f"the NVIDIA driver is older than 570, {library} lacks {name}; {DRIVER}")
            function.argtypes, function.restype = signature, INT
            self._functions[name] = function

    def _call(self, name: str, pid: int, argument: Any = None) -> int:
        result: int = self._functions[name](pid, argument)
        return result

    def lock(self, pid: int, milliseconds: int) -> int:
        return self._call("cuCheckpointProcessLock", pid, ctypes.byref(_LockArguments(timeoutMs=milliseconds)))

    def checkpoint(self, pid: int) -> int:
        return self._call("cuCheckpointProcessCheckpoint", pid)

    def restore(self, pid: int) -> int:
        return self._call("cuCheckpointProcessRestore", pid)

    def unlock(self, pid: int) -> int:
        return self._call("cuCheckpointProcessUnlock", pid)

    def state(self, pid: int) -> tuple[int, int]:
        number = INT()
        return self._call("cuCheckpointProcessGetState", pid, ctypes.byref(number)), number.value


class _Watched:
    """A driver whose calls come back once their process has ended, also where the driver's own do not."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._ended: set[int] = set()

    def lock(self, pid: int, milliseconds: int) -> int:
        return self._call(pid, lambda: self._driver.lock(pid, milliseconds), _ENDED)

    def checkpoint(self, pid: int) -> int:
        return self._call(pid, lambda: self._driver.checkpoint(pid), _ENDED)

    def restore(self, pid: int) -> int:
        return self._call(pid, lambda: self._driver.restore(pid), _ENDED)

    def unlock(self, pid: int) -> int:
        return self._call(pid, lambda: self._driver.unlock(pid), _ENDED)

    def state(self, pid: int) -> tuple[int, int]:
        return self._call(pid, lambda: self._driver.state(pid), (_ENDED, 0))

    def _call(self, pid: int, work: Callable[[], T], ended: T) -> T:
        if pid in self._ended:
            return ended
        answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((work(), None))
            except BaseException as error:
                answers.put((None, error))

        began, until = _began(pid), None
        threading.Thread(target=answer, daemon=True, name=f"thaw-driver-{pid}").start()
        while True:
            try:
                found, error = answers.get(timeout=_GRACE / 10)
                break
            except queue.Empty:
                if not has_ended(pid) and _began(pid) == began:
                    continue
                until = until or monotonic() + _GRACE
                if monotonic() >= until:
                    self._ended.add(pid)
                    return ended
        if error is not None:
            raise error
        return cast("T", found)


def has_ended(pid: int) -> bool:
    """Whether there is no such process, or only its exit status. One that /proc does not show may be there."""
    fields = stat(pid)
    if fields is not None:
        return fields[0] in "ZXx"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # there, and another's
        return False
    return False


def _began(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where /proc does not tell."""
    fields = stat(pid)
    return None if fields is None else fields[19]


def unsupported(library: str = "libcuda.so.1") -> str | None:
    """Why this machine's driver has no such calls, with the cure; None where it has. Says nothing about permission."""
    try:
        Libcuda(library)
    except UnsupportedError as error:
        return str(error)
    return None


def park(pids: Sequence[int], *, timeout: float, driver: Driver | None = None) -> None:
    """Take the CUDA state of some processes off their GPUs: all of them, or none.

    None is checkpointed before all are locked, so work that they share is never cut in two. On an error, and on Ctrl-C,
    what was checkpointed is restored and what was locked is unlocked; all run on then, except one that the driver lost,
    which the error names. Where all are parked already, nothing is done.

    Args:
        pids: processes that use CUDA, by their ids in this PID namespace.
        timeout: seconds for locking all of them, which waits for their work on the GPU. Moving their memory is not
            limited.
        driver: another than the installed one, for tests.

    Raises:
        UsageError: ``timeout`` is no positive number that the driver can take.
        UnsupportedError: see ``unsupported``.
        DeviceError: one cannot be parked, or ends meanwhile; what is wrong, the cure, and what could not be undone.

    Notes:
        Processes that talk through NCCL could not be locked together with driver 575: once one was, each call on
        another waited until it was unlocked (NVIDIA/cuda-checkpoint, issue 30). Whether a lock's time ends that wait
        is not known.
    """
    if not 0 < timeout <= _LONGEST / 1000:
        raise UsageError(f"timeout is {timeout!r}; give the seconds that locking may take, above 0 and below 50 days")
    used, asked = _Watched(driver or Libcuda()), list(dict.fromkeys(pids))
    # In a thread of its own, which Ctrl-C does not interrupt between a call and the note that it was made.
    crew(lambda stop: _park(used, asked, monotonic() + timeout, stop), 1)


def wake(pids: Iterable[int], *, driver: Driver | None = None) -> None:
    """Give processes their GPUs back: restore all that are checkpointed, then unlock all that are locked.

    One that runs counts as woken. A failure with one does not keep the others from being woken; a second call tries
    again what is left.

    Raises:
        UnsupportedError: see ``unsupported``.
        DeviceError: some could not be woken; which, why, and that their state may be lost.
    """
    used, asked = _Watched(driver or Libcuda()), list(dict.fromkeys(pids))
    crew(lambda _: _wake(used, asked), 1)


def state(pid: int, *, driver: Driver | None = None) -> str:
    """``"running"``, ``"locked"``, ``"checkpointed"`` or ``"failed"``.

    Raises:
        UnsupportedError: see ``unsupported``.
        DeviceError: no such process, one without CUDA, or a state that is none of these.
    """
    used = driver if isinstance(driver, _Watched) else _Watched(driver or Libcuda())
    result, number = used.state(pid)
    if result:
        raise _failure(pid, "asked for its state", result)
    if not 0 <= number < len(_STATES):
        raise DeviceError(f"process {pid} is in state {number}, which this version does not know; wait, and ask again")
    return _STATES[number]


def _park(driver: Driver, pids: list[int], until: float, stop: threading.Event) -> None:
    if all(state(pid, driver=driver) == "checkpointed" for pid in pids):
        return
    locked: list[int] = []
    results: dict[int, int] = {}
    try:
        for pid in pids:
            left = until - monotonic()
            result = driver.lock(pid, max(1, math.floor(left * 1000))) if left > 0 else _NOT_READY
            if result:
                raise _failure(pid, "locked", result)
            locked.append(pid)
            _go_on(stop)
        _each(driver.checkpoint, locked, results)
        failed = [str(_failure(pid, "checkpointed", results[pid])) for pid in locked if results[pid]]
        if failed:
            raise DeviceError(". ".join(failed))
        _go_on(stop)
    except BaseException as error:
        left_over = _undo(driver, locked, [pid for pid, result in results.items() if not result])
        if left_over:
            raise DeviceError(f"{error}. Not everything could be undone: {'. '.join(left_over)}") from error
        raise


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


def _undo(driver: Driver, locked: list[int], checkpointed: list[int]) -> list[str]:
    """Have all of ``locked`` run again; which could not, in words.

    Asks for no states before: such a call may wait until another process is unlocked.
    """
    results = _each(driver.restore, checkpointed)
    failed = [_lost(pid, "restored", results[pid]) for pid in checkpointed if results[pid]]
    return failed + _unlock(driver, [pid for pid in locked if not results.get(pid)])


def _wake(driver: Driver, pids: list[int]) -> None:
    states, failed = {}, []
    for pid in pids:
        try:
            states[pid] = state(pid, driver=driver)
        except DeviceError as error:
            failed.append(f"{error}; if it was parked, {_LOST}")
    failed += [
        f"process {pid} cannot be restored: a checkpoint of it has failed; {_LOST}"
        for pid, found in states.items()
        if found == "failed"
    ]
    results = _each(driver.restore, [pid for pid, found in states.items() if found == "checkpointed"])
    failed += [_lost(pid, "restored", result) for pid, result in results.items() if result]
    asleep = [pid for pid, found in states.items() if found in ("locked", "checkpointed")]
    failed += _unlock(driver, [pid for pid in asleep if not results.get(pid)])
    if failed:
        raise DeviceError(". ".join(failed))


def _unlock(driver: Driver, pids: list[int]) -> list[str]:
    """Have locked processes run; which do not, in words."""
    failed = []
    for pid in pids:
        result = driver.unlock(pid)
        if result and driver.state(pid) != (0, _STATES.index("running")):
            failed.append(_lost(pid, "unlocked", result))
    return failed


def _each(call: Callable[[int], int], pids: Sequence[int], results: dict[int, int] | None = None) -> dict[int, int]:
    """What ``call`` gives for each process, all at once; ``results`` has what came back, however this ends."""
    found = {} if results is None else results

    def work(pid: int) -> None:
        found[pid] = call(pid)

    run(pids, work, len(pids))
    return found


def _lost(pid: int, done: str, result: int) -> str:
    return f"{_failure(pid, done, result)}; {_LOST}"


def _failure(pid: int, done: str, result: int) -> DeviceError:
    """The error that ``result`` stands for; ``done`` completes "cannot be …"."""
    name, cure = _RESULTS.get(result, (f"CUDA error {result}", "nvidia-smi and the kernel's log may say more"))
    if (done, result) == ("restored", _OUT_OF_MEMORY):
        cure = _NO_ROOM_TO_RESTORE
    return DeviceError(f"process {pid} cannot be {done}: {name}, {cure}")
