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
from typing import TYPE_CHECKING, Any

from ..errors import CorruptionError, MismatchError
from .checksum import damaged
from .cuda import ADDRESS, LAZILY, SIZE, Context, IpcHandle, Stream
from .pipeline import Range
from .straight import GROUP
from .wordsum_cuda import CudaSums, Kernel

if TYPE_CHECKING:
    import torch

_STREAMS = 4
"""On which copies take turns: one copy between two GPUs may leave room for another."""

Run = tuple[int, int]
"""Address or offset, and bytes."""


class BorrowedGpu:
    """A lender's allocations as a source; owns what of them is mapped until closed.

    For one thread, but for ``read_into`` and ``pieces`` once everything is mapped.

    Attributes:
        where: which memory, as the lender calls it.
        over: what lies between; None within one memory.
    """

    over: str | None

    def __init__(self, told: dict[str, Any], places: Sequence[Run], name: str, device: torch.device) -> None:
        """As ``lending.borrow``; nothing is mapped yet."""
        self.name, self.size = name, max((at + size for at, size in places), default=0)
        self._runs: list[list[int]] = told["runs"]
        if [size for _, _, size in self._runs] != [size for _, size in places]:
            raise MismatchError(f"{name} are not as large as the snapshot says")
        self._handles = [IpcHandle.from_buffer_copy(bytes.fromhex(handle)) for handle in told["handles"]]
        self._places, self._begins = places, list[int]()
        self._mapped, self._ends = dict[int, int](), dict[int, float]()
        self._lanes, self._events, self._sums = list[Stream](), dict[int, int](), list[CudaSums]()
        self._context = Context(device.index or 0)
        try:
            self.where = f"cuda:{told['device']}"
            bus = told["gpu"]
            self.over = None if bus == self._context.bus else self._context.reaches(bus) or "peer access"
        except BaseException:
            self._context.close()
            raise

    def map(self) -> None:
        """Map everything.

        Raises:
            MismatchError: a run lies beyond the memory that is lent.
            DeviceError: the driver maps it not.
        """
        with self._context.entered():
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
        with self._context.entered():
            if sums:
                self._sums.append(CudaSums(self._context, sums, kernel))
            for turn in range(min(_STREAMS, len(into))):
                self._lanes.append(Stream(self._context, events=len(into[turn::_STREAMS])))
            for number, address in enumerate(into):
                held = self._address(number)
                self._begins.append(held)
                if address is None:
                    continue
                lane = self._lanes[number % _STREAMS]
                size = self._places[number][1]
                self._context.driver.call("cuMemcpyDtoDAsync_v2", address, held, size, lane.handle)
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
        (sums,), results, awaited = self._sums, list[int](), 0
        with self._context.entered():
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

    def pieces(self, offset: int, length: int) -> list[Run]:
        """Where a range of this source lies, mapped; it is within one run."""
        number = self._number(offset, length)
        return [(self._begins[number] + offset - self._places[number][0], length)]

    def cuts(self, offset: int, length: int) -> Iterator[Run]:
        """A range as parts that each are within one run: offset and length."""
        while length > 0:
            number = bisect.bisect_right(self._places, offset, key=lambda place: place[0]) - 1
            size = min(length, sum(self._places[number]) - offset) if number >= 0 else 0
            if size <= 0:
                raise CorruptionError(f"{self.name} have no {length} bytes at {offset}")
            yield offset, size
            offset, length = offset + size, length - size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        into = ctypes.addressof((ctypes.c_ubyte * len(view)).from_buffer(view)) if len(view) else 0
        with self._context.entered():
            stream = Stream(self._context)
            try:
                for address, size in self.pieces(offset, len(view)):
                    self._context.driver.call("cuMemcpyDtoHAsync_v2", into, address, size, stream.handle)
            finally:
                stream.close()

    def check_unchanged(self) -> None:
        """See Source; sums tell."""

    def close(self) -> None:
        """Wait for copies, and unmap; a second call does nothing."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._context.close)
            if self._mapped or self._lanes or self._sums:
                stack.enter_context(self._context.entered())
                stack.callback(self._unmap)
                for sums in self._sums:
                    stack.callback(sums.close)
                for lane in self._lanes:
                    stack.callback(lane.close)
                self._lanes, self._sums = [], []

    def _address(self, number: int) -> int:
        """Where a run is, which is mapped if it is not yet; the calling thread has entered the context."""
        allocation, at, size = self._runs[number]
        if allocation not in self._mapped:
            made = self._context.driver.made("cuIpcOpenMemHandle_v2", self._handles[allocation], LAZILY)
            self._mapped[allocation] = made
            self._ends[allocation] = _end(self._context, made)
        address = self._mapped[allocation] + at
        if address + size > self._ends[allocation]:
            raise MismatchError(f"{self.name} reach beyond the memory that is lent")
        return address

    def _unmap(self) -> None:
        while self._mapped:
            self._context.driver["cuIpcCloseMemHandle"](self._mapped.popitem()[1])

    def _number(self, offset: int, length: int) -> int:
        """The run that a range lies in."""
        return number_of(self._places, offset, length, self.name)


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
