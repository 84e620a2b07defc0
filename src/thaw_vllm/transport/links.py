"""How staged bytes reach the memory they are for: CUDA's driver for NVIDIA GPUs, torch's ``copy_`` for any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import DeviceError
from .cuda import Context, Driver, Stream
from .numa import near, pinned_to
from .plan import Step
from .staging import Slot
from .wordsum_cuda import CudaSums, Kernel
from .wordsum_torch import wordsum

if TYPE_CHECKING:
    import torch


class Lane(Protocol):
    """One thread's slot and its way to the device; fill the slot, ``send``, again and again."""

    def send(self, step: Step, head: int) -> None:
        """Copy what is wanted of a step from the slot, in which the step begins at ``head``; returns once it landed."""


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

    def lane(self, slot: Slot) -> contextlib.AbstractContextManager[Lane]:
        """For the calling thread; leaving it waits for what is under way, also after an error."""

    def sums(self, count: int) -> contextlib.AbstractContextManager[Sums]:
        """For the calling thread, of at most ``count`` ranges."""

    def admits(self, number: int) -> bool:
        """Asked before a range is read, in any thread, until it says yes: whether there is room for it."""

    def landed(self, number: int) -> None:
        """A range is there, in any thread; what is left to be done for it is asked for."""

    def settle(self) -> None:
        """Wait for that."""

    def close(self) -> None:
        """Let go of the device."""


class _AsItIs:
    """For links whose ranges land where they stay."""

    def admits(self, number: int) -> bool:
        """See Link."""
        return True

    def landed(self, number: int) -> None:
        """See Link."""

    def settle(self) -> None:
        """See Link."""


class Place(NamedTuple):
    """Where a range goes: ``length`` bytes from byte ``begin`` of a tensor's memory; borrows the tensor.

    For CUDA the tensor is any whose bytes lie without gaps, for other devices a uint8 one of shape ``(bytes,)``.
    """

    view: torch.Tensor
    begin: int
    length: int

    def bytes(self) -> torch.Tensor:
        """The range alone, of a uint8 tensor."""
        return self.view[self.begin : self.begin + self.length]


def by_driver(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU, whose driver is used; torch's ROCm builds call theirs ``cuda`` too."""
    import torch

    return device.type == "cuda" and torch.version.cuda is not None


def link_to(places: Sequence[Place], kernel: Kernel | None = None) -> Link:
    """The link for ranges that go to places on one device.

    Args:
        kernel: on that device, if it is one with a kernel, borrowed; None has one loaded.

    Raises:
        DeviceError: the GPU or its driver refused.
    """
    device = places[0].view.device
    if by_driver(device):
        return CudaLink(device.index or 0, runs_of(places), kernel)
    return TorchLink(places, device.type)


def runs_of(places: Sequence[Place]) -> list[tuple[int, int]]:
    """Address and bytes of each."""
    return [(place.view.data_ptr() + place.begin, place.length) for place in places]


class TorchLink(_AsItIs):
    """Copies that have ended when ``copy_`` returns; for every device that torch knows, the host among them."""

    def __init__(self, places: Sequence[Place], device: str) -> None:
        """
        Args:
            places: of each range; may grow, a place is needed when its range begins to be sent.
            device: type of the places' device, for the name.
        """
        self.name, self._places = f"torch copies to {device}", places

    @contextlib.contextmanager
    def lane(self, slot: Slot) -> Iterator[Lane]:
        """See Link."""
        yield _TorchLane(self._places, slot)

    @contextlib.contextmanager
    def sums(self, count: int) -> Iterator[Sums]:
        """See Link."""
        yield _TorchSums(self._places)

    def close(self) -> None:
        """Nothing is held."""


class _TorchLane:
    def __init__(self, places: Sequence[Place], slot: Slot) -> None:
        self._places, self._slot = places, slot

    def send(self, step: Step, head: int) -> None:
        import torch

        with torch.inference_mode():  # holds for one thread; tensors made under it can be written under it only
            for cut in step.cuts:
                at = head + cut.at
                data = torch.frombuffer(self._slot.view[at : at + cut.length], dtype=torch.uint8)
                self._places[cut.range].bytes()[cut.begin : cut.begin + cut.length].copy_(data)


class _TorchSums:
    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._found: dict[int, int] = {}

    def add(self, ranges: Sequence[int]) -> None:
        for number in ranges:
            self._found[number] = wordsum(self._places[number].bytes())

    def results(self) -> dict[int, int]:
        return self._found


class CudaLink(_AsItIs):
    """Asynchronous copies from page-locked slots, a stream a thread; sums by a kernel, many chunks a launch.

    Owns a reference to the GPU's primary context until closed.

    Attributes:
        context: that reference.
        runs: address and bytes of each range.
        cores: those near the GPU; empty where it makes no difference.
        looks: whether ``seen`` wants to see how ranges begin.
    """

    looks = False

    def __init__(self, device: int, runs: Sequence[tuple[int, int]], kernel: Kernel | None = None) -> None:
        """
        Args:
            device: ordinal, as torch counts.
            runs: address and bytes of each range in that device's memory, the caller's; may grow, a run is needed
                when its range begins to be sent.
            kernel: see CudaSums.
        """
        self.context, self._kernel = Context(device), kernel
        self.name = f"page-locked slots to cuda:{device}"
        self.runs = runs
        try:
            self.cores = near(self.context.bus)
        except BaseException:
            self.context.close()
            raise

    @contextlib.contextmanager
    def lane(self, slot: Slot) -> Iterator[Lane]:
        """See Link. Page-locks the slot when it is first sent: its pages are there by then, and other threads copy."""
        with pinned_to(self.cores):
            self.context.enter()
            with contextlib.closing(Stream(self.context)) as stream:
                lane = _CudaLane(self, slot, stream)
                try:
                    yield lane
                finally:
                    lane.close()

    def seen(self, number: int, head: memoryview) -> None:
        """How a range begins, in host memory, before it lands."""

    def refused(self, error: DeviceError | None) -> None:
        """A slot cannot be page-locked (some containers forbid it): it works without, slower, and the name says so."""
        if error is not None:
            self.name = f"slots, not page-locked ({error}), to cuda:{self.context.device}"

    @contextlib.contextmanager
    def sums(self, count: int) -> Iterator[Sums]:
        """See Link."""
        with self.context.entered(), CudaSums(self.context, count, self._kernel) as sums:
            yield _CudaRanges(sums, self.runs)

    def close(self) -> None:
        """See Link."""
        self.context.close()


class Window:
    """One slot, page-locked when its pages are there: locking memory that nobody wrote yet costs more."""

    def __init__(self, driver: Driver, slot: Slot) -> None:
        """Borrows the slot."""
        self._driver, self._slot, self._locked = driver, slot, False
        self._copy = driver["cuMemcpyHtoDAsync_v2"]

    def lock(self) -> DeviceError | None:
        """Called in a thread with a context; returns why it was refused. The slot works without, slower."""
        try:
            self._driver.call("cuMemHostRegister_v2", self._slot.address, self._slot.view.nbytes, 0)
            self._locked = True
        except DeviceError as error:
            return error
        return None

    def send(self, step: Step, head: int, link: CudaLink, stream: Stream) -> None:
        """Ask for the copies of what is wanted of a step, which begins at ``head`` in the slot, to the link's runs."""
        base, runs = self._slot.address + head, link.runs
        for cut in step.cuts:
            if link.looks and not cut.begin:
                link.seen(cut.range, self._slot.view[head + cut.at : head + cut.at + cut.length])
            result = self._copy(runs[cut.range][0] + cut.begin, base + cut.at, cut.length, stream.handle)
            if result:
                self._driver.check("cuMemcpyHtoDAsync_v2", result)

    def unlock(self) -> None:
        """Once nothing copies from it any more, in a thread with a context; a second call does nothing."""
        if self._locked:
            self._locked = False
            self._driver["cuMemHostUnregister"](self._slot.address)


class _CudaLane:
    """On a stream of its own, which waits for nothing that torch has queued."""

    def __init__(self, link: CudaLink, slot: Slot, stream: Stream) -> None:
        self._link, self._window, self._stream = link, Window(link.context.driver, slot), stream
        self._tried = False

    def send(self, step: Step, head: int) -> None:
        if not self._tried:
            self._tried = True
            self._link.refused(self._window.lock())
        self._window.send(step, head, self._link, self._stream)
        self._stream.synchronize()

    def close(self) -> None:
        """Wait for what an error left under way, and unlock the slot."""
        try:
            self._stream.synchronize()
        finally:
            self._window.unlock()


class _CudaRanges:
    def __init__(self, sums: CudaSums, runs: Sequence[tuple[int, int]]) -> None:
        self._sums, self._runs = sums, runs
        self._order: list[int] = []

    def add(self, ranges: Sequence[int]) -> None:
        self._sums.add([self._runs[number] for number in ranges])
        self._order += ranges

    def results(self) -> dict[int, int]:
        return dict(zip(self._order, self._sums.results(), strict=True))
