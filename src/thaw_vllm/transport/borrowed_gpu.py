"""Another process's allocations on a GPU, copied to one of this process's while the next are mapped.

Mapping one takes a tenth of a millisecond, copying it over NVLink three times as long, and there are as many as large
tensors. So a run is asked to be copied as soon as what it lies in is mapped, before anybody has looked at chunks.
Unmapping is for the end: beside copies it takes longer, and delays them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import CorruptionError, DeviceError, MismatchError
from .checksum import damaged
from .cuda import ADDRESS, LAZILY, SIZE, Context, IpcHandle, Stream
from .pipeline import Range
from .staging import Staging
from .straight import GROUP
from .wordsum_cuda import CudaSums, Kernel

_STREAMS = 4
"""On which copies take turns: one copy between two GPUs may leave room for another."""

Run = tuple[int, int]
"""Address or offset, and bytes."""


class BorrowedGpu:
    """A lender's allocations as a source; owns what of them is mapped until closed.

    For one thread, but for ``read_into``, ``spans`` and a ``Room`` each once everything is mapped.

    Attributes:
        where: which memory, as the lender calls it.
        over: what lies between; None within one memory.
        context: of the GPU where copies go.
    """

    over: str | None

    def __init__(self, told: dict[str, Any], places: Sequence[Run], name: str, gpu: int) -> None:
        """As ``lending.borrow``, to the GPU of that ordinal; nothing is mapped yet."""
        self.name, self.size = name, max((at + size for at, size in places), default=0)
        self._runs: list[list[int]] = told["runs"]
        if [size for _, _, size in self._runs] != [size for _, size in places]:
            raise MismatchError(f"{name} are not as large as the snapshot says")
        self._handles = [IpcHandle.from_buffer_copy(bytes.fromhex(handle)) for handle in told["handles"]]
        self._places, self._begins = places, list[int]()
        self._mapped, self._ends = dict[int, int](), dict[int, float]()
        self._lanes, self._events = list[Stream](), dict[int, int]()
        self._sums: CudaSums | None = None
        self.context = Context(gpu)
        try:
            self.where = f"cuda:{told['device']}"
            bus = told["gpu"]
            self.over = None if bus == self.context.bus else self.context.reaches(bus) or "peer access"
        except BaseException:
            self.context.close()
            raise

    def map(self) -> None:
        """Map everything.

        Raises:
            MismatchError: a run lies beyond the memory that is lent.
            DeviceError: the driver maps it not.
        """
        with self.context.entered():
            self._begins = [self._address(number) for number in range(len(self._runs))]

    def begin(self, into: Sequence[int | None], sums: int, kernel: Kernel | None = None) -> None:
        """Map everything, and ask for a copy of each run as soon as that can be read.

        Args:
            into: for each run where it is to go in the memory of this process's GPU, which nobody writes or reads until
                ``send`` has returned or this is closed; None where it is not to be copied as a whole.
            sums: how many ranges ``send`` will be asked for, at most.
            kernel: that sums on this GPU, borrowed; None has one loaded, which waits for what the GPU does.

        Raises:
            MismatchError, DeviceError: as ``map``; a part may have been copied.
        """
        with self.context.entered():
            if sums:
                self._sums = CudaSums(self.context, sums, kernel)
            for turn in range(min(_STREAMS, len(into))):
                self._lanes.append(Stream(self.context, events=len(into[turn::_STREAMS])))
            for number, address in enumerate(into):
                held = self._address(number)
                self._begins.append(held)
                if address is None:
                    continue
                lane = self._lanes[number % _STREAMS]
                size = self._places[number][1]
                self.context.driver.call("cuMemcpyDtoDAsync_v2", address, held, size, lane.handle)
                lane.mark(number // _STREAMS)
                self._events[number] = lane.events[number // _STREAMS]

    def send(
        self,
        ranges: Sequence[Range],
        runs: Sequence[Run],
        *,
        verify: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Hold ranges of what ``begin`` copies against their sums where they arrive; returns when all are in place.

        Args:
            ranges: of this source, in order, each within one run.
            runs: address in the GPU's memory and bytes of each, where ``begin`` was told to bring it.
            verify: whether to check.
            progress: called with the bytes of some of them once their sums were asked for.

        Raises:
            CorruptionError: bytes are not what their sum says.
            DeviceError: the GPU or its driver refused.
        """
        sums, results, awaited = self._sums, list[int](), 0
        assert sums is not None, "begin comes first"
        with self.context.entered():
            for first in range(0, len(ranges), GROUP):
                group = ranges[first : first + GROUP]
                if verify:
                    end = self._number(group[-1].offset, group[-1].length) + 1
                    for number in range(awaited, end):
                        if number in self._events:
                            sums.after(self._events[number])
                    awaited = end
                    sums.add(runs[first : first + GROUP])
                if progress is not None:
                    progress(sum(found.length for found in group))
            if verify:
                results = sums.results()
            for lane in self._lanes:
                lane.synchronize()
        for found, result in zip(ranges if verify else (), results, strict=True):
            if result != found.wordsum:
                raise damaged(self.name, found.label, found.offset, found.length)

    def spans(self, offset: int, length: int) -> Iterator[Run]:
        """Where a range of this source lies, mapped, which may go over several runs.

        Raises:
            CorruptionError: it is not within the source.
        """
        while length > 0:
            number = self._number(offset, 1)
            size = min(length, sum(self._places[number]) - offset)
            yield self._held(offset, size), size
            offset, length = offset + size, length - size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        into = ctypes.addressof((ctypes.c_ubyte * len(view)).from_buffer(view)) if len(view) else 0
        with self.context.entered():
            stream = Stream(self.context)
            try:
                held = self._held(offset, len(view))
                self.context.driver.call("cuMemcpyDtoHAsync_v2", into, held, len(view), stream.handle)
            finally:
                stream.close()

    def check_unchanged(self) -> None:
        """See Source; sums tell."""

    def close(self) -> None:
        """Wait for copies, and unmap; a second call does nothing."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.context.close)
            if self._mapped or self._lanes or self._sums:
                stack.enter_context(self.context.entered())
                stack.callback(self._unmap)
                for one in (self._sums, *self._lanes):
                    if one is not None:
                        stack.callback(one.close)
                self._lanes, self._sums = [], None

    def _address(self, number: int) -> int:
        """Where a run is, which is mapped if it is not yet; the calling thread has entered the context."""
        allocation, at, size = self._runs[number]
        if allocation not in self._mapped:
            made = self.context.driver.made("cuIpcOpenMemHandle_v2", self._handles[allocation], LAZILY)
            self._mapped[allocation] = made
            self._ends[allocation] = _end(self.context, made)
        address = self._mapped[allocation] + at
        if address + size > self._ends[allocation]:
            raise MismatchError(f"{self.name} reach beyond the memory that is lent")
        return address

    def _unmap(self) -> None:
        while self._mapped:
            self.context.driver["cuIpcCloseMemHandle"](self._mapped.popitem()[1])

    def _held(self, offset: int, length: int) -> int:
        """Where a range within one run lies, mapped."""
        number = self._number(offset, length)
        return self._begins[number] + offset - self._places[number][0]

    def _number(self, offset: int, length: int) -> int:
        """The run that a range lies in."""
        return number_of(self._places, offset, length, self.name)


class Room:
    """Page-locked host memory into which one thread has ranges of a borrowed GPU's bytes copied; its own until closed.

    From there the driver copies by itself, and other threads go on; into any other memory it copies in their time.
    """

    def __init__(self, source: BorrowedGpu, size: int) -> None:
        """
        Args:
            source: all of it mapped; stays open until this is closed.
            size: bytes of the longest range, a multiple of the kernel's pages.

        Raises:
            OSError: no address space.
            DeviceError: the driver makes no stream.
        """
        self._source, self._context = source, source.context
        with contextlib.ExitStack() as stack:
            (self._slot,) = stack.enter_context(Staging(1, size)).slots
            with self._context.entered():
                self._stream = Stream(self._context)
                stack.callback(self._stream.close)
                with contextlib.suppress(DeviceError):  # works without, slower
                    self._context.driver.call("cuMemHostRegister_v2", self._slot.address, size, 0)
                    stack.callback(self._context.driver["cuMemHostUnregister"], self._slot.address)
            self._stack = stack.pop_all()

    def read(self, offset: int, length: int) -> memoryview:
        """A range of the source, which may go over several runs; valid until the next one. The caller releases it.

        Raises:
            CorruptionError: the source has no such range.
            DeviceError: the driver refused.
        """
        address = self._slot.address
        with self._context.entered():
            try:
                for held, size in self._source.spans(offset, length):
                    self._context.driver.call("cuMemcpyDtoHAsync_v2", address, held, size, self._stream.handle)
                    address += size
            finally:
                self._stream.synchronize()
        return self._slot.view[:length]

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        with self._context.entered():
            self._stack.close()


def number_of(places: Sequence[Run], offset: int, length: int, name: str) -> int:
    """The one of runs of a source that a range lies in.

    Raises:
        CorruptionError: none.
    """
    number = bisect.bisect_right(places, offset, key=lambda place: place[0]) - 1
    if number >= 0 and offset + length <= sum(places[number]):
        return number
    raise CorruptionError(f"{name} have no {length} bytes at {offset}")


def _end(context: Context, address: int) -> float:
    """Where the allocation ends that an address lies in; the calling thread has entered the context.

    CUDA's manual does not say that the driver tells it of another process's memory; where it does not, that is unknown.
    """
    base, whole = ADDRESS(), SIZE()
    refused = context.driver["cuMemGetAddressRange_v2"](ctypes.byref(base), ctypes.byref(whole), address)
    return math.inf if refused else base.value + whole.value
