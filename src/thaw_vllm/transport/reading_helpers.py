"""Processes that read files into shared memory, so that many cores read without one interpreter lock among them.

On an H100 host with 16 cores, 14 threads of one process read and send 16 GB from tmpfs at 20 to 38 GB/s, by the host
and the day: each of their steps waits for the lock 60 to 100 µs. 14 processes with two slots of 2 MiB, which stay in
the cores' caches, do it at the link's speed: 49 of 51 GB/s.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType

from ..errors import DeviceError
from . import reading_helper as helper
from .cuda import Context
from .files import Files
from .links import Window
from .numa import near, pinned_to
from .readers import Cached, Reader
from .source import FileSource, Source
from .staging import Slot, address_of, populate

SLOT = 2 << 20
SLOTS = 2
"""Bytes of a slot, and slots a helper: one is filled while the other is copied from."""
MOST = 14
"""Helpers at most. With 12 to 14 on 16 cores the link is the limit; with 16, the parent and they are in each other's
way."""
_CORES = 8
"""Cores from which helpers are started: on fewer, threads lose little to the lock."""
WORTH, WORTH_RUNNING = 1 << 30, 64 << 20
"""Bytes of a file from which starting them is worth it, 20 ms until all are there, and from which using them is."""
_SCRIPT = Path(helper.__file__)
_LOCKERS = 4
"""Threads that page-lock slots, 0.4 ms each."""
_END = 2.0
"""Seconds in which they end by themselves, or the first one is killed: a device may keep one of them longer."""


def wanted(source: Source, reader: Reader, workers: int | None, cores: int, *, running: bool = False) -> int:
    """How many helpers to start for a source that goes to a GPU; 0 for none.

    Their words in shared memory rely on stores being seen in order, as on x86-64. Only for plain reads of files, and
    where this process is an ordinary interpreter that can be started again.

    Args:
        cores: that they may run on.
        running: whether they are there already.
    """
    if (
        source.size < (WORTH_RUNNING if running else WORTH)
        or cores < _CORES
        or not able()
        or not isinstance(source, FileSource | Files)
        or type(reader) is not Cached
    ):
        return 0
    return most(workers, cores)


def most(workers: int | None, cores: int) -> int:
    """Helpers on so many cores, where ``able`` says that there can be some."""
    return min(workers or MOST, MOST, cores - 2) if cores >= _CORES else 0


def able() -> bool:
    """Whether there can be helpers on this machine, of this interpreter."""
    return (
        platform.machine() == "x86_64"
        and not getattr(sys, "frozen", False)
        and Path(sys.executable or "").name.startswith("python")
        and _SCRIPT.is_file()
        and _calls()
    )


@cache
def _calls() -> bool:
    """Whether this interpreter and this kernel have the calls that helpers need."""
    calls = [(os, "memfd_create"), (os, "pidfd_open"), (os, "posix_spawn"), (os, "P_PIDFD"), (os, "waitid")]
    if not all(hasattr(module, name) for module, name in [*calls, (signal, "pidfd_send_signal")]):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # an older kernel, or forbidden
        return False
    return True


class Helper:
    """One process and its slots; the Helpers'.

    Attributes:
        slots: that it fills in turn.
        windows: the same for the GPU.
        locks: of each slot, done once page-locking was tried; gives why that was refused.
        given, filled: ranges so far, of all deliveries.
        ended: it does nothing any more, and has nothing in its hands.
    """

    def __init__(self, words: memoryview, slots: list[Slot], windows: list[Window], line: socket.socket) -> None:
        self.slots, self.windows, self.given, self.ended = slots, windows, 0, False
        self.locks: list[Future[DeviceError | None]] = []
        self._words, self._line = words, line
        self._file: FileSource | Files | None = None
        self._jobs: list[tuple[int, int]] = [(0, 0)] * len(slots)

    def begin(self, file: FileSource | Files) -> None:
        """The next delivery, from this file or these, which stay the caller's."""
        self._file = file
        try:
            said = helper.LISTED if file.listed else helper.PLAIN
            socket.send_fds(self._line, [said], [file.descriptor], socket.MSG_NOSIGNAL)
        except OSError:  # it has ended, or is made to: no room for a descriptor on its way. ``check`` finds out
            _hang_up(self._line)

    def finish(self) -> None:
        """That delivery is over, and all that was given has been filled."""
        self._file = None
        self._words[helper.OVER] += 1

    def give(self, offset: int, length: int) -> None:
        """Have the next slot filled; nobody may need what is in it."""
        slot = self.given % len(self.slots)
        self._jobs[slot] = (offset, length)
        self._words[helper.JOBS + 2 * slot] = offset
        self._words[helper.JOBS + 2 * slot + 1] = length
        self.given += 1
        self._words[helper.GIVEN] = self.given

    @property
    def filled(self) -> int:
        return int(self._words[helper.FILLED])

    def lock(self, number: int, context: Context) -> DeviceError | None:
        """Page-lock a slot; see Window. The process is still coming up, which takes longer."""
        slot = self.slots[number]
        populate(slot.address, len(slot.view))  # where that fails locking does it, slower
        try:
            context.enter()
        except DeviceError as error:
            return error
        return self.windows[number].lock()

    def check(self) -> None:
        """See whether it is well. One that ended by itself has its ranges read here, and gets no more.

        Raises:
            CorruptionError: the file ends early.
            StorageError: the device failed.
        """
        failed, file = self._words[helper.FAILED], self._file
        if file is None:
            raise ValueError("nothing is read between two deliveries")
        if failed:
            at = self._words[helper.AT]
            if failed == helper.ENDED:
                offset, length = self._jobs[self.filled % len(self.slots)]
                raise file.ended(at, offset + length)
            raise file.failed(at, OSError(failed, os.strerror(failed)))
        if self.ended or not _has_ended(self._line):
            return
        for number in range(self.filled, self.given):
            offset, length = self._jobs[number % len(self.slots)]
            file.read_into(offset, self.slots[number % len(self.slots)].view[:length])
            self._words[helper.FILLED] = number + 1
        self.ended = True


class Helpers:
    """Processes, and their slots in one region of shared memory, page-locked for one GPU.

    ``reading`` is a delivery; there can be several, one after another. Close it in every case.

    Attributes:
        slot: bytes of a slot.
        helpers: by number.
        sound: whether they can be used again: no delivery has failed half-way, and at least one is there.

    Notes:
        They are started with nothing but descriptors, in a process group of their own, so that Ctrl-C in a terminal is
        the parent's alone, and end by themselves soon after their parent did. They come up, and threads lock their
        slots, while the caller does something else. Between deliveries they sleep.
    """

    def __init__(self, device: int, count: int, *, slot: int = SLOT, slots: int = SLOTS) -> None:
        """
        Args:
            device: ordinal of the GPU, as torch counts.
            count: processes.
            slot: bytes, a multiple of the kernel's pages.
            slots: of each.

        Raises:
            OSError: no memory, or no process can be started.
            DeviceError: the GPU or its driver refused.
        """
        self.slot, self._closed, self._broken = slot, False, False
        first = count * helper.PAGE
        size = first + count * slots * slot
        self._process = -1
        self._lines: list[socket.socket] = []
        self._words: list[memoryview] = []
        self.helpers: list[Helper] = []
        self.device, self._context = device, Context(device)
        self._shared = -1
        self._view = memoryview(b"")
        self._memory: mmap.mmap | None = None
        self._pool = ThreadPoolExecutor(_LOCKERS, thread_name_prefix="thaw-lock")
        try:
            self._shared = os.memfd_create("thaw", os.MFD_CLOEXEC)
            os.ftruncate(self._shared, size)
            self._memory = mmap.mmap(self._shared, size)
            self._view, base = memoryview(self._memory), address_of(self._memory)
            with pinned_to(near(self._context.bus)):
                self._start(count, first, slots)
                for number in range(count):
                    control = number * helper.PAGE
                    words = self._view[control : control + helper.PAGE].cast("Q")
                    self._words.append(words)
                    begin = first + number * slots * slot
                    places = range(begin, begin + slots * slot, slot)
                    own = [Slot(self._view[at : at + slot], base + at) for at in places]
                    windows = [Window(self._context.driver, found) for found in own]
                    self.helpers.append(Helper(words, own, windows, self._lines[number]))
                for number in range(slots):
                    for found in self.helpers:
                        found.locks.append(self._pool.submit(found.lock, number, self._context))
        except BaseException:
            self.close()
            raise

    def _start(self, count: int, first: int, slots: int) -> None:
        """The first process, which forks the others.

        It is known by a descriptor (pidfd): its number could be another process's by the time it is used. The others
        are known by their sockets.
        """
        theirs: list[socket.socket] = []
        try:
            for _ in range(count):
                own, other = socket.socketpair()
                self._lines.append(own)
                theirs.append(other)
                for line in (own, other):  # whatever the process's default for sockets is
                    line.setblocking(True)
            free = max(self._shared, *(line.fileno() for line in theirs)) + 1
            actions = [(os.POSIX_SPAWN_DUP2, self._shared, free)]
            actions += [(os.POSIX_SPAWN_DUP2, line.fileno(), free + 1 + n) for n, line in enumerate(theirs)]
            process = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(_SCRIPT), *map(str, (free, count, first, slots, self.slot))],
                os.environ,
                file_actions=actions,
                setpgroup=0,
            )
            try:
                self._process = os.pidfd_open(process)
            except BaseException as error:
                with contextlib.suppress(OSError):  # ended, and was waited for by whoever ignores SIGCHLD here
                    os.killpg(process, signal.SIGKILL)  # nobody has waited for it: the number is still its own
                    os.waitpid(process, 0)
                if isinstance(error, ProcessLookupError):
                    raise OSError("a helper process ended at once") from None
                raise
        finally:
            for line in theirs:
                line.close()

    @property
    def sound(self) -> bool:
        return not (self._broken or self._closed) and any(not _has_ended(line) for line in self._lines)

    @contextlib.contextmanager
    def reading(self, source: FileSource | Files) -> Iterator[None]:
        """A delivery of this source's ranges; after one that fails they are of no more use."""
        sound, self._broken = not self._broken, True  # until all of them have heard of its end
        for found in self.helpers:
            found.begin(source)
        yield
        for found in self.helpers:
            sound = sound and (found.filled == found.given or found.ended)
            found.finish()
        self._broken = not sound

    def close(self) -> None:
        """End them; nothing may be copying from their slots any more. A second call does nothing.

        That they have ended, and their memory is returned, takes some milliseconds more, which a thread of its own
        waits for.
        """
        if self._closed:
            return
        self._closed = True
        try:
            threading.Thread(target=self._end, name="thaw-helpers-end").start()
        except RuntimeError:  # no more threads, or the interpreter ends
            self._end()

    def _end(self) -> None:
        for line in self._lines:
            _hang_up(line)
        if self._process >= 0:
            # The first waits for the others, so that none of them is left to a process 1 that waits for nobody.
            if not _readable(self._process, _END):
                with contextlib.suppress(OSError):  # ended
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # waited for by somebody else
                os.waitid(os.P_PIDFD, self._process, os.WEXITED)
            os.close(self._process)
        self._pool.shutdown()  # no slot is being locked any more
        try:
            with self._context.entered():
                for found in self.helpers:
                    for window in found.windows:
                        window.unlock()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for words in self._words:
            words.release()
        for found in self.helpers:
            for slot in found.slots:
                slot.view.release()
        self._view.release()
        if self._memory is not None:
            with contextlib.suppress(BufferError):  # an error on its way holds views; memory goes with them
                self._memory.close()
        if self._shared >= 0:
            os.close(self._shared)
        self._context.close()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _has_ended(line: socket.socket) -> bool:
    """Whether the process at the other end has closed it; it never says anything."""
    descriptor = line.fileno()
    return descriptor < 0 or _readable(descriptor, 0)


def _hang_up(line: socket.socket) -> None:
    """Close a line for good: a process that was forked from this one meanwhile may hold it too."""
    with contextlib.suppress(OSError):  # nobody is at the other end
        line.shutdown(socket.SHUT_RDWR)
    line.close()


def _readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))
