"""The way to a GPU for ranges of which some are compressed: those go to scratch memory, and are decoded from there."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ..codecs.planes import ALIGN, HEAD, Frame, aligned, layout
from ..errors import CorruptionError, DeviceError, FormatError
from .cuda import Stream
from .links import CudaLink
from .planes_cuda import LIKELIEST, PlaneKernels, room
from .wordsum_cuda import CudaSums, Kernel

SCRATCH = 512 << 20
"""Bytes of device memory at most for what is under way: stored bytes, and planes that are put together only later. At
50 GB/s it fills in 10 ms; a chunk of 16 MiB is decoded in 0.1 ms alone, 0.02 ms among others."""
_STREAMS, _EVENTS = 8, 8
"""Streams that decode, and chunks under way on each. One chunk has blocks for a sixteenth of a large GPU's warps."""
_APART = 256


class CodedLink(CudaLink):
    """A CudaLink whose compressed ranges are admitted as scratch memory comes free, and decoded once they have landed.

    Owns scratch memory and streams until closed; no allocator of torch or of an engine sees them.
    """

    looks = True

    def __init__(
        self,
        device: int,
        runs: Sequence[tuple[int, int]],
        stored: Sequence[int],
        damage: Callable[[int], CorruptionError],
        kernel: Kernel | None = None,
        kernels: PlaneKernels | None = None,
    ) -> None:
        """
        Args:
            device: ordinal, as torch counts.
            runs: address and original bytes of each range in that device's memory, the caller's.
            stored: of each range the bytes that are compressed; 0 where it is as it is.
            damage: what to raise for a range, by its number.
            kernel: see CudaSums.
            kernels: that decode, on this device, borrowed; None has them loaded.

        Raises:
            DeviceError: no memory for one range; with less than SCRATCH fewer are under way at once.
        """
        super().__init__(device, runs, kernel)
        self.finals, self._stored = runs, stored
        self.runs = self._into = list(runs)
        self._damage = damage
        self._lock = threading.Lock()
        self._frames: dict[int, Frame] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._memory = 0
        self._lanes: list[_Lane] = []
        self._own: PlaneKernels | None = None
        try:
            needs = [self._need(number) for number in range(len(stored)) if stored[number]]
            least = max(needs, default=0)
            self._size = max(least, min(SCRATCH, sum(needs)))
            with self.context.entered():
                self._take(least)
                self._scratch = Scratch(self._size)
                for _ in range(_STREAMS if needs else 0):
                    self._lanes.append(_Lane(Stream(self.context, events=_EVENTS + 1)))
            self._turns = itertools.cycle(self._lanes)
            if kernels is None:
                kernels = self._own = PlaneKernels(device)
            self._kernels = kernels
            if needs:
                kernels.load(*LIKELIEST)  # loading waits for copies that are under way, so before there are any
        except BaseException:
            self.close()
            raise

    def _take(self, least: int) -> None:
        """Scratch memory: as much as is wanted, or half of it, and so on; at least for one range."""
        while self._size and not self._memory:
            try:
                self._memory = self.context.driver.made("cuMemAlloc_v2", self._size)
            except DeviceError:
                if self._size == least:
                    raise
                self._size = max(least, self._size // 2 // _APART * _APART)

    def _need(self, number: int) -> int:
        address, length = self.finals[number]
        planes = length * 3 // 4  # all but the last of four: see ``room``
        there = length if address % ALIGN else 0  # what is put together where it cannot be in place
        return -(-(self._stored[number] + planes + there + 3 * ALIGN) // _APART) * _APART

    def admits(self, number: int) -> bool:
        """See Link: whether there is scratch memory for a range, which is its own from then on."""
        if not self._stored[number]:
            return True
        size = self._need(number)
        with self._lock:
            if not self._fits(size):
                self._reap()
                if not self._fits(size):
                    return False
            at = self._scratch.take(size)
            self._places[number] = at, size
            self._into[number] = self._memory + at, self._stored[number]
            return True

    def _fits(self, size: int) -> bool:
        return len(self._places) < _STREAMS * _EVENTS and self._scratch.has(size)

    def _reap(self) -> None:
        """What has been decoded makes room, whatever came before it is still on its way."""
        for lane in self._lanes:
            while lane.launched and lane.stream.passed(lane.launched[0][1]):
                number, event = lane.launched.popleft()
                lane.spare.append(event)
                self._scratch.give_back(*self._places.pop(number))

    def seen(self, number: int, head: memoryview) -> None:
        """See CudaLink.

        Raises:
            CorruptionError: not a frame of so many bytes.
        """
        if not self._stored[number]:
            return
        try:
            self._frames[number] = layout(bytes(head[:HEAD]), self.finals[number][1], self._stored[number])
        except FormatError as error:
            raise self._damage(number) from error

    def landed(self, number: int, after: int = 0) -> None:
        """See Link. The calling thread has entered the context.

        Args:
            after: an event before which the range may not have landed; 0 where it has.
        """
        if not self._stored[number]:
            return
        with self._lock:
            frame, stored = self._frames.pop(number), self._memory + self._places[number][0]
            lane = next(lane for lane in self._turns if lane.spare)  # each range that was admitted has an event
            if after:
                self.context.driver.call("cuStreamWaitEvent", lane.stream.handle, after, 0)
            out, length = self.finals[number]
            planes = aligned(stored + frame.size)
            there = out if out % ALIGN == 0 else aligned(planes + room(frame))
            self._kernels.decode(frame, stored, planes, there, lane.stream.handle)
            if there != out:
                self.context.driver.call("cuMemcpyDtoDAsync_v2", out, there, length, lane.stream.handle)
            event = lane.spare.pop()
            lane.stream.mark(event)
            lane.launched.append((number, event))

    @contextlib.contextmanager
    def sums(self, count: int) -> Iterator[DecodedSums]:
        """See Link."""
        with self.context.entered(), CudaSums(self.context, count, self._kernel) as sums:
            yield DecodedSums(self, sums)

    def wait(self, sums: CudaSums) -> None:
        """Let sums wait for what is being decoded."""
        with self._lock:
            for lane in self._lanes:
                lane.stream.mark(_EVENTS)
                sums.after(lane.stream.events[_EVENTS])

    def settle(self) -> None:
        """See Link."""
        with self._lock, self.context.entered():
            for lane in self._lanes:
                lane.stream.synchronize()

    def close(self) -> None:
        """See Link."""
        lanes, self._lanes = self._lanes, []
        memory, self._memory = self._memory, 0
        own, self._own = self._own, None
        with contextlib.ExitStack() as stack:
            stack.callback(super().close)
            if own is not None:
                stack.callback(own.close)
            if lanes or memory:
                stack.enter_context(self.context.entered())
            if memory:
                stack.callback(self.context.driver["cuMemFree_v2"], memory)
            for lane in lanes:
                stack.callback(lane.stream.close)


class _Lane:
    """A stream that decodes, and the events of what was asked of it, oldest first."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.spare = stream, [*range(_EVENTS)]
        self.launched: deque[tuple[int, int]] = deque()


class Scratch:
    """Which parts of some memory are taken: the first that is long enough, given back in any order.

    Not a ring: one reader that is late would keep everybody waiting whose part comes after its own.
    """

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []

    def has(self, size: int) -> bool:
        """Whether ``take`` has a part of so many bytes."""
        return any(end - begin >= size for begin, end in self._free)

    def take(self, size: int) -> int:
        """Where it begins."""
        number = next(n for n, (begin, end) in enumerate(self._free) if end - begin >= size)
        begin, end = self._free.pop(number)
        if begin + size < end:
            self._free.insert(number, (begin + size, end))
        return begin

    def give_back(self, at: int, size: int) -> None:
        """A part that was taken, of the same size."""
        number = bisect.bisect(self._free, (at, at))
        begin, end = at, at + size
        if number < len(self._free) and self._free[number][0] == end:
            end = self._free.pop(number)[1]
        if number and self._free[number - 1][1] == begin:
            begin = self._free.pop(number - 1)[0]
            number -= 1
        self._free.insert(number, (begin, end))


class DecodedSums:
    """Of ranges that may still be being decoded; see ``links.Sums``."""

    def __init__(self, link: CodedLink, sums: CudaSums) -> None:
        self._link, self._sums = link, sums
        self._order: list[int] = []
        self.after = sums.after

    def add(self, ranges: Sequence[int]) -> None:
        """Ask for ranges by number, once what is being decoded is there."""
        self._link.wait(self._sums)
        self._sums.add([self._link.finals[number] for number in ranges])
        self._order += ranges

    def results(self) -> dict[int, int]:
        """Range to sum; waits for them."""
        return dict(zip(self._order, self._sums.results(), strict=True))
