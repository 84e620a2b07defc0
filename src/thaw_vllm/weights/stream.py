"""A plain checkpoint's tensors, one after another, while those behind them are on their way to the device."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..errors import UnsupportedError
from ..transport import parallel
from ..transport.links import CudaLink, Link, Place, TorchLink, by_driver
from ..transport.pipeline import Range, deliver
from ..transport.readers import choose
from .checkpoint import Checkpoint, StoredTensor
from .layout import byte_view

WINDOW = 1 << 30
"""Bytes of device memory for tensors that were asked for and not taken yet; one larger tensor may have it alone."""


@dataclass
class StreamReport:
    """What was streamed; complete once the iterator has ended.

    Attributes:
        bytes: of the tensors.
        tensors: how many.
        route: how the bytes moved.
        why: why that way.
        sources: bytes by where they came from, where that was told apart.
        seconds: as in a RestoreReport; set by whoever takes the tensors.
    """

    bytes: int = 0
    tensors: int = 0
    route: str = ""
    why: str = ""
    sources: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class _Abandoned(Exception):
    """Whoever iterated wants no more."""


def stream(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    workers: int | None = None,
    window: int = WINDOW,
    report: StreamReport | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a safetensors checkpoint, in about the order of the files.

    Each tensor is memory of its own on ``device`` and the caller's to keep; what the caller drops is used again. Files
    of this kind hold no checksums: nothing is verified beyond their headers.

    Args:
        checkpoint: of safetensors files.
        device: where to; a CUDA device through page-locked slots.
        workers: threads; None for what the machine bears.
        window: bytes; see WINDOW.
        report: filled in.
        progress: called with the bytes that arrived since the last call, in a thread of its own.

    Raises:
        UnsupportedError: another format.
        ReplacedError, StorageError, CorruptionError, DeviceError: a file changed, ends early or cannot be read; or the
            device failed. No tensor is given that did not arrive whole.
    """
    if not checkpoint.headers:
        raise UnsupportedError(f"{str(checkpoint.directory)!r} holds no safetensors files; only those can be streamed")
    work = _Stream(
        checkpoint, device, workers or parallel.default_workers(), window, report or StreamReport(), progress
    )
    # Threads that the interpreter finds in torch's code when it ends would end it with an abort.
    atexit.register(work.abandon)
    try:
        work.start()
        yield from work.arrived()
    finally:
        work.abandon()
        atexit.unregister(work.abandon)
    checkpoint.check_unchanged()


class _Stream:
    """One thread brings (``start``), another takes (``arrived``); between them a window of device memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        workers: int,
        window: int,
        report: StreamReport,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._checkpoint, self._device, self._workers = checkpoint, device, workers
        self._window, self._report, self._progress = window, report, progress
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._ended.set()
        self._outstanding, self._abandoned = 0, False
        self._ready: queue.SimpleQueue[tuple[str, torch.Tensor] | BaseException | None] = queue.SimpleQueue()
        # What the caller asked the device to do with a tensor is done when this has been waited for.
        self._consumer = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def start(self) -> None:
        """Begin to bring."""
        self._ended.clear()
        try:
            threading.Thread(target=self._run, name="thaw-stream", daemon=True).start()
        except RuntimeError:
            self._ended.set()
            raise

    def _run(self) -> None:
        try:
            for name in self._checkpoint.files:
                self._file(name, [t for t in self._checkpoint.tensors if t.file == name])
            self._ready.put(None)
        except BaseException as error:  # raised where the tensors are taken
            self._ready.put(error)
        finally:
            self._ended.set()

    def _file(self, name: str, every: list[StoredTensor]) -> None:
        for stored in every:
            if stored.begin == stored.end:
                self._ready.put((stored.name, self._made(stored)))
        tensors = [stored for stored in every if stored.begin < stored.end]
        given: list[torch.Tensor | None] = [None] * len(tensors)
        places: list[Place] = []
        nowhere = Place(torch.empty(0, dtype=torch.uint8), 0, 0)
        runs: list[tuple[int, int]] = []
        ranges = [Range(t.begin, t.end - t.begin, 0, repr(t.name)) for t in tensors]

        def admit(number: int) -> bool:
            stored = tensors[number]
            size = stored.end - stored.begin
            with self._lock:
                if self._abandoned:
                    raise _Abandoned
                if self._outstanding and self._outstanding + size > self._window:
                    return False
                self._outstanding += size
            tensor = given[number] = self._made(stored)
            if self._consumer is not None:
                # The memory may be that of a tensor which the caller dropped while a kernel was reading it.
                self._consumer.synchronize()
            view = byte_view(tensor)
            places.append(Place(view, 0, size))
            runs.append((view.data_ptr(), size))
            return True

        def landed(number: int) -> None:
            tensor, given[number] = given[number], None
            places[number] = nowhere  # which would keep the memory until the whole file is there
            assert tensor is not None
            self._ready.put((tensors[number].name, tensor))

        with contextlib.ExitStack() as stack:
            source = stack.enter_context(self._checkpoint.open_file(name))
            reader = stack.enter_context(contextlib.closing(choose(source)))
            link: Link
            if by_driver(self._device):
                link = CudaLink(self._device.index or 0, runs)
            else:
                link = TorchLink(places, self._device.type)
            stack.callback(link.close)
            deliver(
                reader,
                source.name,
                ranges,
                link,
                workers=self._workers,
                verify=False,
                progress=self._progress,
                admit=admit,
                landed=landed,
            )
            report = self._report
            report.route, report.why = f"{reader.route} → {link.name}", reader.why
            report.bytes += sum(r.length for r in ranges)
            report.tensors += len(every)
            for kind, count in reader.summary().items():
                report.sources[kind] = report.sources.get(kind, 0) + count

    def _made(self, stored: StoredTensor) -> torch.Tensor:
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device=self._device)

    def arrived(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor once it is in place; what the consumer did with one is over when it asks for the next."""
        while (found := self._ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            name, tensor = found
            size = tensor.numel() * tensor.element_size()
            del found
            if self._consumer is not None:  # it was made on another stream
                tensor.record_stream(self._consumer)
            yield name, tensor
            del tensor
            with self._lock:
                self._outstanding -= size

    def abandon(self) -> None:
        """Stop bringing, and wait until nothing is written to anybody's memory any more, Ctrl-C or not."""
        interrupted: KeyboardInterrupt | None = None
        with self._lock:
            self._abandoned = True
        while not self._ended.is_set():
            try:
                self._ended.wait(1)
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted
