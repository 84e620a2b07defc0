"""A whole file held in page-locked host memory, so that it can be copied to GPUs at the link's speed, repeatedly."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Sequence

from ..codecs.planes import HEAD
from ..errors import DeviceError, StorageError
from . import parallel
from .checksum import damaged
from .coded_link import CodedLink
from .cuda import Context, Stream
from .kernels import Kernels
from .medium import in_memory
from .pipeline import Range
from .readers import Reader
from .source import FileSource, MemorySource
from .staging import HUGE, address_of, advise_huge
from .straight import GROUP, send

LOCK = 128 << 20
"""Bytes locked by one call: many threads lock in parallel (24 GB/s with 8 threads, 6.4 with one), and no copy may cross
from one locked part to the next."""
TASK = 16 << 20
"""Bytes that one thread reads at a time."""
_MARKS = 64
"""Events of a stream that copies; by the time that one is used again, whoever had to wait for it has been told so."""

_PORTABLE, _READ_ONLY = 1, 8
"""CU_MEMHOSTREGISTER_PORTABLE (for every GPU) and _READ_ONLY (for mappings that cannot be written)."""


class Locked:
    """A run of host memory that every GPU may copy from, locked in parts of LOCK bytes; unlocked when closed."""

    def __init__(self, context: Context, address: int, size: int, workers: int, flags: int) -> None:
        """
        Raises:
            DeviceError: it cannot be locked; nothing of it is, then.
        """
        self._context, self.address = context, address
        self._parts: list[int] = []
        parts = [(address + at, min(LOCK, size - at)) for at in range(0, size, LOCK)]

        def lock(part: tuple[int, int]) -> None:
            with context.entered():
                context.driver.call("cuMemHostRegister_v2", *part, flags)
                self._parts.append(part[0])

        try:
            parallel.run(parts, lock, min(workers, len(parts)))
        except BaseException:
            self.close()
            raise

    def pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Address and length of runs: together ``length`` bytes from ``offset``, none across two locked parts."""
        found, end = [], offset + length
        while offset < end:
            size = min(end - offset, LOCK - offset % LOCK)
            found.append((self.address + offset, size))
            offset += size
        return found

    def close(self) -> None:
        """Unlock all of it, Ctrl-C or not, since it is unmapped next; a second call does nothing."""
        interrupted: KeyboardInterrupt | None = None

        def unlock(address: int) -> None:
            with self._context.entered():
                self._context.driver["cuMemHostUnregister"](address)
            self._parts.remove(address)

        while self._parts:
            try:
                parallel.run(tuple(self._parts), unlock, min(len(self._parts), parallel.default_workers()))
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class Resident(MemorySource):
    """The bytes of a file in this process's memory, page-locked where there is a GPU; a source like any other.

    A file on tmpfs is mapped, which takes no further memory; any other is read into memory of its own. Owns the memory
    until closed.

    Attributes:
        why: how the bytes are held, and why so.
        locked: the memory as GPUs copy from it; None without a GPU.
        kernels: for what is restored from it.
    """

    def __init__(self, file: FileSource, reader: Reader, context: Context | None, workers: int) -> None:
        """
        Args:
            file: borrowed until closed.
            reader: of ``file``; not needed afterwards.
            context: of any GPU, for locking; None for host memory alone. Borrowed until closed.
            workers: threads.

        Raises:
            StorageError: not enough memory, or the file cannot be read.
            DeviceError: the memory cannot be locked.
        """
        self._file, self._shared, self.why = file, False, ""
        self._held: mmap.mmap | None = None
        self.locked: Locked | None = None
        self.kernels = Kernels()
        try:
            if not (file.size and in_memory(file.descriptor) and self._map(context, workers)):
                self._copy(reader, context, workers)
        except BaseException:
            self._release()
            raise

    def _map(self, context: Context | None, workers: int) -> bool:
        size = self._file.size
        try:
            held = mmap.mmap(self._file.descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError):  # no mappings here, or the file is shorter by now: reading will tell
            return False
        if context is not None:
            try:
                self.locked = Locked(context, address_of(held), size, workers, _PORTABLE | _READ_ONLY)
            except DeviceError:  # some GPUs and drivers lock only what can be written
                held.close()
                return False
        self._held, self._shared, self.why = held, True, "the file is on tmpfs and is mapped as it is"
        super().__init__(memoryview(held), self._file.name)
        return True

    def _copy(self, reader: Reader, context: Context | None, workers: int) -> None:
        size = self._file.size
        try:
            self._held = mmap.mmap(-1, size + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            raise StorageError(f"no memory for the {size / 1e9:.2f} GB of {self._file.name!r}: {error}") from None
        first = -address_of(self._held) % HUGE
        advise_huge(self._held)
        with memoryview(self._held) as view:

            def bring(at: int) -> None:
                # Whole blocks, at whole blocks' addresses: what is read beyond the range is beyond the file too.
                length = min(TASK, size - at)
                reader.read(at, length, view[first + at : first + at + length + reader.margin])

            parallel.run(range(0, size, TASK), bring, workers)
        self._file.check_unchanged()
        if context is not None and size:
            self.locked = Locked(context, address_of(self._held) + first, size, workers, _PORTABLE)
        self.why = f"read into memory of its own; {reader.why}"
        super().__init__(memoryview(self._held)[first : first + size], self._file.name)

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source; asks first, since touching what was cut off a mapped file would end this process (SIGBUS)."""
        self.check_unchanged()
        super().read_into(offset, view)

    def check_unchanged(self) -> None:
        """A mapped file shows what is written to it; memory of its own does not change."""
        if self._shared:
            self._file.check_unchanged()

    def send(
        self,
        context: Context,
        ranges: Sequence[Range],
        runs: Sequence[tuple[int, int]],
        *,
        verify: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy ranges straight to a GPU, and hold each against its word sum there; returns when all are in place.

        Args:
            context: that GPU's; this thread is in it meanwhile.
            ranges: of this source, which is ``locked``.
            runs: address in the GPU's memory and bytes of each.
            verify: whether to check.
            progress: called with the bytes of each group once they were asked for.

        Raises:
            CorruptionError: see ``pipeline.deliver``.
            DeviceError: the GPU or its driver refused.
        """
        assert self.locked is not None
        kernel = self.kernels.sums(context.device) if verify else None
        pieces, copy = self.locked.pieces, "cuMemcpyHtoDAsync_v2"
        send(context, self.name, ranges, runs, pieces, copy, verify=verify, kernel=kernel, progress=progress)

    def send_coded(
        self,
        link: CodedLink,
        ranges: Sequence[Range],
        *,
        verify: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """``send`` where some ranges are compressed: each is decoded as soon as it is there, while others arrive.

        Args:
            link: to that GPU, of these ranges.
        """
        assert self.locked is not None
        call, found = link.context.driver.call, dict[int, int]()
        with link.context.entered(), contextlib.ExitStack() as stack:
            stream = Stream(link.context, events=_MARKS)
            stack.callback(stream.close)  # last: what waits for its events is over by then
            sums = stack.enter_context(link.sums(len(ranges))) if verify else None
            stack.callback(link.settle)
            asked = 0
            for number, wanted in enumerate(ranges):
                while not link.admits(number):
                    time.sleep(0)  # others run meanwhile
                if wanted.coded:
                    head = memoryview(bytearray(min(wanted.length, HEAD)))
                    self.read_into(wanted.offset, head)
                    link.seen(number, head)
                address = link.runs[number][0]
                for held, size in self.locked.pieces(wanted.offset, wanted.length):
                    call("cuMemcpyHtoDAsync_v2", address, held, size, stream.handle)
                    address += size
                event = stream.events[number % _MARKS]
                stream.mark(number % _MARKS)
                link.landed(number, event)
                if progress is not None:
                    progress(wanted.length)
                if sums is not None and (number + 1 - asked == GROUP or number + 1 == len(ranges)):
                    sums.after(event)
                    sums.add(range(asked, number + 1))
                    asked = number + 1
            link.settle()
            stream.synchronize()
            if sums is not None:
                found = sums.results()
        for number, result in found.items():
            wanted = ranges[number]
            if result != wanted.wordsum:
                raise damaged(self.name, wanted.label, wanted.offset, wanted.length)

    def close(self) -> None:
        """Unlock and return the memory; nothing may be copying from it. A second call does nothing."""
        if self._held is not None:
            super().close()
            self._release()

    def _release(self) -> None:
        locked, self.locked = self.locked, None
        held, self._held = self._held, None
        try:
            with contextlib.ExitStack() as stack:  # each in any case
                if locked is not None:
                    stack.callback(locked.close)
                stack.callback(self.kernels.close)
        finally:
            if held is not None:
                with contextlib.suppress(BufferError):  # see Staging.close
                    held.close()
