"""How staged bytes reach the memory they are for: CUDA's driver for NVIDIA GPUs, torch's ``copy_`` for any device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .cuda import NOT_READY, Context, Stream
from .numa import near, pinned_to
from .plan import Step
from .staging import Slot
from .wordsum_cuda import CudaSums
from .wordsum_torch import wordsum

if TYPE_CHECKING:
    import torch

Landed = Callable[[Step], None]
"""Called in a lane's thread once a step's bytes are in the memory they are for."""


class Lane(Protocol):
    """One thread's slots and its way to the device; ``take``, fill, ``send``, again and again."""

    def take(self) -> Slot:
        """The next slot, once what it held has been copied."""

    def send(self, step: Step, head: int) -> None:
        """Copy what is wanted of a step from the slot taken last, in which the step begins at ``head``."""

    def finish(self) -> None:
        """Wait until everything sent has landed."""


class Sums(Protocol):
    """Word sums of ranges whose bytes have landed."""

    def add(self, ranges: Sequence[int]) -> None:
        """Ask for ranges by number."""

    def results(self) -> dict[int, int]:
        """Range to sum, of all that were asked for; waits for them."""


class Link(Protocol):
    """The way to one device for a list of ranges; ``lane`` is entered by each thread, ``sums`` by one.

    Attributes:
        name: for reports.
    """

    name: str

    def lane(self, slots: Sequence[Slot], landed: Landed) -> contextlib.AbstractContextManager[Lane]:
        """For the calling thread; leaving it waits for what is under way, also after an error."""

    def sums(self) -> contextlib.AbstractContextManager[Sums]:
        """For the calling thread."""

    def close(self) -> None:
        """Let go of the device."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a range goes: ``length`` bytes from ``begin`` of a uint8 tensor of shape ``(bytes,)``; borrows it."""

    view: torch.Tensor
    begin: int
    length: int

    def bytes(self) -> torch.Tensor:
        """The range alone."""
        return self.view[self.begin : self.begin + self.length]


def link_to(places: Sequence[Place]) -> Link:
    """The link for ranges that go to places on one device.

    Raises:
        DeviceError: the GPU or its driver refused.
    """
    import torch

    device = places[0].view.device
    if device.type == "cuda" and torch.version.cuda is not None:
        return CudaLink(device.index or 0, [(place.view.data_ptr() + place.begin, place.length) for place in places])
    return TorchLink(places)


class TorchLink:
    """Copies that have ended when ``copy_`` returns; for every device that torch knows, the host among them."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.name, self._places = f"torch copies to {places[0].view.device.type}", places

    @contextlib.contextmanager
    def lane(self, slots: Sequence[Slot], landed: Landed) -> Iterator[Lane]:
        """See Link."""
        yield _TorchLane(self._places, slots, landed)

    @contextlib.contextmanager
    def sums(self) -> Iterator[Sums]:
        """See Link."""
        yield _TorchSums(self._places)

    def close(self) -> None:
        """Nothing is held."""


class _TorchLane:
    def __init__(self, places: Sequence[Place], slots: Sequence[Slot], landed: Landed) -> None:
        self._places, self._slot, self._landed = places, slots[0], landed

    def take(self) -> Slot:
        return self._slot

    def send(self, step: Step, head: int) -> None:
        import torch

        with torch.inference_mode():  # holds for one thread; tensors made under it can be written under it only
            for cut in step.cuts:
                at = head + cut.at
                data = torch.frombuffer(self._slot.view[at : at + cut.length], dtype=torch.uint8)
                self._places[cut.range].bytes()[cut.begin : cut.begin + cut.length].copy_(data)
        self._landed(step)

    def finish(self) -> None:
        """Every copy has ended."""


class _TorchSums:
    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._found: dict[int, int] = {}

    def add(self, ranges: Sequence[int]) -> None:
        for number in ranges:
            self._found[number] = wordsum(self._places[number].bytes())

    def results(self) -> dict[int, int]:
        return self._found


class CudaLink:
    """Asynchronous copies from page-locked slots, a stream a thread; sums by a kernel, many chunks a launch.

    Owns a reference to the GPU's primary context until closed.

    Attributes:
        context: that reference.
        runs: address and bytes of each range.
    """

    def __init__(self, device: int, runs: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            device: ordinal, as torch counts.
            runs: address and bytes of each range in that device's memory; the caller's.
        """
        self.context = Context(device)
        self.name = f"page-locked slots to cuda:{device}"
        self.runs = runs
        self._cores = near(self.context.bus)

    @contextlib.contextmanager
    def lane(self, slots: Sequence[Slot], landed: Landed) -> Iterator[Lane]:
        """See Link. Page-locks each slot when it is first sent: its pages are there by then, and other threads copy."""
        with pinned_to(self._cores):
            self.context.enter()
            lane = _CudaLane(self.context, self.runs, slots, landed)
            try:
                yield lane
            finally:
                lane.close()

    @contextlib.contextmanager
    def sums(self) -> Iterator[Sums]:
        """See Link."""
        self.context.enter()
        with CudaSums(self.context, len(self.runs)) as sums:
            yield _CudaRanges(sums, self.runs)

    def close(self) -> None:
        """See Link."""
        self.context.close()


class _CudaLane:
    def __init__(
        self, context: Context, runs: Sequence[tuple[int, int]], slots: Sequence[Slot], landed: Landed
    ) -> None:
        self._driver, self._runs, self._slots, self._landed = context.driver, runs, slots, landed
        self._held: list[Step | None] = [None] * len(slots)
        self._locked = [False] * len(slots)
        self._next = 0
        self._stream = Stream(context, events=len(slots))
        self._copy = self._driver["cuMemcpyHtoDAsync_v2"]
        self._record = self._driver["cuEventRecord"]
        self._query = self._driver["cuEventQuery"]

    def take(self) -> Slot:
        number = self._next
        step = self._held[number]
        if step is not None:
            event = self._stream.events[number]
            result = self._query(event)
            if result == NOT_READY:
                result = self._driver["cuEventSynchronize"](event)
            if result:
                self._driver.check("cuEventSynchronize", result)
            self._held[number] = None
            self._landed(step)
        return self._slots[number]

    def send(self, step: Step, head: int) -> None:
        number = self._next
        slot, stream = self._slots[number], self._stream.handle
        if not self._locked[number]:
            self._driver.call("cuMemHostRegister_v2", slot.address, slot.view.nbytes, 0)
            self._locked[number] = True
        base = slot.address + head
        for cut in step.cuts:
            result = self._copy(self._runs[cut.range][0] + cut.begin, base + cut.at, cut.length, stream)
            if result:
                self._driver.check("cuMemcpyHtoDAsync_v2", result)
        result = self._record(self._stream.events[number], stream)
        if result:
            self._driver.check("cuEventRecord", result)
        self._held[number] = step
        self._next = (number + 1) % len(self._slots)

    def finish(self) -> None:
        for _ in self._slots:
            self.take()
            self._next = (self._next + 1) % len(self._slots)

    def close(self) -> None:
        """Wait for what is under way, and unlock the slots."""
        try:
            self._stream.close()
        finally:
            for slot, locked in zip(self._slots, self._locked, strict=True):
                if locked:
                    self._driver["cuMemHostUnregister"](slot.address)
            self._locked = [False] * len(self._slots)


class _CudaRanges:
    def __init__(self, sums: CudaSums, runs: Sequence[tuple[int, int]]) -> None:
        self._sums, self._runs = sums, runs
        self._order: list[int] = []

    def add(self, ranges: Sequence[int]) -> None:
        self._sums.add([self._runs[number] for number in ranges])
        self._order += ranges

    def results(self) -> dict[int, int]:
        return dict(zip(self._order, self._sums.results(), strict=True))
