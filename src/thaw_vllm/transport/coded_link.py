"""The way to a GPU for ranges of which some are compressed: those go to scratch memory, and are decoded from there."""

from __future__ import annotations

import contextlib
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
        self._under_way: deque[int] = deque()
        self._places: dict[int, tuple[int, int]] = {}
        self._events: dict[int, tuple[Stream, int]] = {}
        self._launched = 0
        self._memory = 0
        self._streams: list[Stream] = []
        self._own: PlaneKernels | None = None
        try:
            needs = [self._need(number) for number in range(len(stored)) if stored[number]]
            least = max(needs, default=0)
            self._size = max(least, min(SCRATCH, sum(needs)))
            with self.context.entered():
                self._take(least)
                for _ in range(_STREAMS if needs else 0):
                    self._streams.append(Stream(self.context, events=_EVENTS + 1))
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
        with self._lock:
            while self._under_way and self._done(self._under_way[0]):
                del self._places[self._under_way[0]], self._events[self._under_way.popleft()]
            if len(self._under_way) == _STREAMS * _EVENTS:
                return False
            at, size = self._free(), self._need(number)
            if at is None or at[1] - at[0] < size:
                if not self._under_way or at is None or at[1] != self._size:
                    return False
                at = 0, self._places[self._under_way[0]][0]  # what is left at the end is left
                if at[1] < size:
                    return False
            self._places[number] = at[0], at[0] + size
            self._under_way.append(number)
            self._into[number] = self._memory + at[0], self._stored[number]
            return True

    def _free(self) -> tuple[int, int] | None:
        """The run after the newest range; None where there is none."""
        if not self._under_way:
            return 0, self._size
        oldest, newest = self._places[self._under_way[0]][0], self._places[self._under_way[-1]][1]
        if newest > oldest:
            return newest, self._size
        return (newest, oldest) if newest < oldest else None

    def _done(self, number: int) -> bool:
        stream, event = self._events.get(number, (None, 0))
        return stream is not None and stream.passed(event)

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
            frame = self._frames.pop(number)
            stream, event = self._streams[self._launched % _STREAMS], self._launched // _STREAMS % _EVENTS
            self._launched += 1
            if after:
                self.context.driver.call("cuStreamWaitEvent", stream.handle, after, 0)
            stored, (out, length) = self._memory + self._places[number][0], self.finals[number]
            planes = aligned(stored + frame.size)
            there = out if out % ALIGN == 0 else aligned(planes + room(frame))
            self._kernels.decode(frame, stored, planes, there, stream.handle)
            if there != out:
                self.context.driver.call("cuMemcpyDtoDAsync_v2", out, there, length, stream.handle)
            stream.mark(event)
            self._events[number] = stream, event

    @contextlib.contextmanager
    def sums(self, count: int) -> Iterator[DecodedSums]:
        """See Link."""
        with self.context.entered(), CudaSums(self.context, count, self._kernel) as sums:
            yield DecodedSums(self, sums)

    def wait(self, sums: CudaSums) -> None:
        """Let sums wait for what is being decoded."""
        with self._lock:
            for stream in self._streams:
                stream.mark(_EVENTS)
                sums.after(stream.events[_EVENTS])

    def settle(self) -> None:
        """See Link."""
        with self._lock, self.context.entered():
            for stream in self._streams:
                stream.synchronize()

    def close(self) -> None:
        """See Link."""
        streams, self._streams = self._streams, []
        memory, self._memory = self._memory, 0
        own, self._own = self._own, None
        with contextlib.ExitStack() as stack:
            stack.callback(super().close)
            if own is not None:
                stack.callback(own.close)
            if streams or memory:
                stack.enter_context(self.context.entered())
            if memory:
                stack.callback(self.context.driver["cuMemFree_v2"], memory)
            for stream in streams:
                stack.callback(stream.close)


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
