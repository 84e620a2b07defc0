"""Bytes on their way out: from device memory, or the host's, into a slot of the thread that hashes and writes them."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from ..errors import DeviceError
from .cuda import Context, Stream
from .encoder import Encoder
from .numa import near, pinned_to
from .plan import BLOCK
from .source import copy
from .staging import Slot, Staging
from .wordsum_cuda import CudaSums


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` bytes at ``address`` in the memory of a CUDA device, by torch's ordinal."""

    device: int
    address: int
    length: int


class Drain:
    """Staging memory of one slot a thread, and the GPUs that bytes come from; owns both until closed."""

    def __init__(
        self,
        workers: int,
        size: int,
        devices: Sequence[int] = (),
    ) -> None:
        """
        Args:
            workers: threads that will each enter ``lane`` once.
            size: bytes of the longest piece.
            devices: the GPUs that runs will name.

        Raises:
            DeviceError: a GPU or its driver refused.
        """
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._contexts = {device: stack.enter_context(contextlib.closing(Context(device))) for device in devices}
            # Whole pages, which may be larger than a block: each slot is page-locked on its own.
            staging = stack.enter_context(Staging(workers, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE))
            cores = [near(context.bus) for context in self._contexts.values()]
            self._stack = stack.pop_all()
        self._workers, self._size = workers, size
        self._encoders: dict[int, Encoder] = {}
        self._for_host: int | None = None
        self._spare, self._lock = list(staging.slots), threading.Lock()
        self._cores = frozenset[int]().union(*cores) if all(cores) else frozenset[int]()

    def compress(self, for_host: int | None = None) -> None:
        """Have lanes compress by GPUs what lies there, where these can; processors do it as well. Before any lane.

        Args:
            for_host: the GPU that compresses what comes from the host. One that no run names is not used for its cores.
        """
        with contextlib.suppress(DeviceError):
            if for_host is not None and for_host not in self._contexts:
                self._contexts[for_host] = self._stack.enter_context(contextlib.closing(Context(for_host)))
        for device, context in self._contexts.items():
            with contextlib.suppress(DeviceError):
                made = Encoder(context, self._size, self._workers, host=device == for_host)
                self._encoders[device] = self._stack.enter_context(contextlib.closing(made))
        self._for_host = for_host if for_host in self._encoders else None

    def sums(self, runs: Sequence[Run]) -> list[int]:
        """The word sum of each run, taken where it lies; waits for them. 16 GB take some 6 ms on an H100."""
        found = [0] * len(runs)
        for device, context in self._contexts.items():
            numbers = [number for number, run in enumerate(runs) if run.device == device]
            if not numbers:
                continue
            with context.entered(), CudaSums(context, len(numbers)) as sums:
                sums.add([(runs[number].address, runs[number].length) for number in numbers])
                for number, result in zip(numbers, sums.results(), strict=True):
                    found[number] = result
        return found

    @contextlib.contextmanager
    def lane(self) -> Iterator[DrainLane]:
        """A slot for the calling thread; leaving it waits for what is under way, also after an error."""
        with self._lock:
            slot = self._spare.pop()
        with pinned_to(self._cores):
            lane = DrainLane(self._contexts, self._encoders, self._for_host, slot)
            try:
                yield lane
            finally:
                lane.close()

    def close(self) -> None:
        """Return the memory; every lane has been left. A second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Drain:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class DrainLane:
    """One thread's slot; what it holds is good until the next call."""

    def __init__(
        self, contexts: dict[int, Context], encoders: dict[int, Encoder], for_host: int | None, slot: Slot
    ) -> None:
        self._contexts, self._encoders, self._slot = contexts, encoders, slot
        self._for_host = for_host
        self._streams: dict[int, Stream] = {}
        self._locked: Context | None = None
        self._tried = False

    def bring(self, run: Run) -> memoryview:
        """A run's bytes in the slot, filled up with zeros to whole blocks."""
        context, stream = self._ready(run.device)
        context.driver.call("cuMemcpyDtoHAsync_v2", self._slot.address, run.address, run.length, stream.handle)
        stream.synchronize()
        return self.padded(run.length)

    def _ready(self, device: int) -> tuple[Context, Stream]:
        """For a device; the first time the slot is page-locked, and what it holds is lost."""
        context = self._contexts[device]
        context.enter()
        if not self._tried:
            self._tried = True
            # Written first, so that the pages are there, and near this thread's core.
            for at in range(0, len(self._slot.view), BLOCK):
                self._slot.view[at] = 0
            with contextlib.suppress(DeviceError):  # where locking is forbidden the driver copies by its own memory
                context.driver.call("cuMemHostRegister_v2", self._slot.address, self._slot.view.nbytes, 1)
                self._locked = context
        if device not in self._streams:
            self._streams[device] = Stream(context)
        return context, self._streams[device]

    def encodes(self, run: Run | None) -> bool:
        """Whether ``encode`` is for this run, or ``encode_held`` for what comes from the host."""
        if run is None:
            locked = not self._tried or self._locked is not None  # else a copy to the GPU would hold everybody up
            return self._for_host is not None and locked
        return run.device in self._encoders and Encoder.takes(run.address)

    def encode(self, run: Run, width: int) -> int | None:
        """Put the frame of a run that ``bring`` brought in its bytes' place; returns its length. None, and the slot as
        it was, where it gains too little.

        Args:
            width: see ``codecs.planes.encode``.
        """
        stream = self._ready(run.device)[1].handle
        return self._encoders[run.device].encode(run.address, run.length, width, self._slot.view, stream)

    def encode_held(self, length: int, width: int) -> int | None:
        """The same of so many bytes that ``hold`` has put into the slot."""
        assert self._for_host is not None
        stream = self._ready(self._for_host)[1].handle
        return self._encoders[self._for_host].encode_held(self._slot.view[:length], width, stream)

    def hold(self, data: memoryview) -> memoryview:
        """A copy of host bytes in the slot, filled up likewise."""
        if self._for_host is not None:
            self._ready(self._for_host)  # which writes to the slot
        copy(self._slot.view[: len(data)], data)
        return self.padded(len(data))

    def padded(self, length: int) -> memoryview:
        """What the slot begins with, filled up likewise."""
        end = -(-length // BLOCK) * BLOCK
        self._slot.view[length:end] = bytes(end - length)
        return self._slot.view[:end]

    def close(self) -> None:
        """Wait for what is under way, and unlock the slot."""
        with contextlib.ExitStack() as stack:  # all of it, also where a GPU refuses
            if self._locked is not None:
                stack.callback(self._locked.driver["cuMemHostUnregister"], self._slot.address)
                stack.callback(self._locked.enter)
                self._locked = None
            for device, stream in self._streams.items():
                stack.callback(stream.close)
                stack.callback(self._contexts[device].enter)
