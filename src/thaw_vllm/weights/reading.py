"""How a file will be read for tensors: by which reader, by whose processes, summed by which kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from ..errors import UsageError
from ..transport import parallel
from ..transport.cuda import Context
from ..transport.files import Files
from ..transport.kept_helpers import KeptHelpers
from ..transport.kernels import Kernels
from ..transport.links import by_driver
from ..transport.numa import near
from ..transport.readers import ROUTES, Reader, choose
from ..transport.reading_helpers import Helpers, wanted
from ..transport.source import FileSource, Source
from ..transport.wordsum_cuda import Kernel


@dataclass(frozen=True)
class RestoreOptions:
    """How a snapshot is read.

    Attributes:
        verify: hold every chunk against its checksum.
        route: ``auto`` looks at the medium and chooses; ``cached`` reads through the page cache, ``direct`` past it.
        workers: threads, or processes; None for what the machine bears.
        processes: whether helper processes may be started to read for a GPU, where they are faster than threads.
        progress: called as (bytes done, bytes in all) from any thread.
    """

    verify: bool = True
    route: str = "auto"
    workers: int | None = None
    processes: bool = True
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, not {self.workers}")
        if self.route not in ROUTES:
            raise UsageError(f"route must be one of {', '.join(ROUTES)}, not {self.route!r}")


@dataclass(frozen=True)
class Reading:
    """How a source will be read; made by ``reading``.

    Attributes:
        reader: the way.
        helpers: processes that read by it, if that is faster.
        kernels: for the GPU, borrowed; None has them loaded.
        seconds: what choosing and starting took.
    """

    reader: Reader
    helpers: Helpers | None
    kernels: Kernels | None
    seconds: float

    def sums(self, device: torch.device) -> Kernel | None:
        """The kernel that sums on a device, if it is one with a kernel, and one is kept.

        Raises:
            DeviceError: the driver does not take it.
        """
        return self.kernels.sums(device.index or 0) if self.kernels is not None and by_driver(device) else None


@contextlib.contextmanager
def reading(
    source: Source, targets: Iterable[torch.Tensor], options: RestoreOptions, kept: KeptHelpers | None = None
) -> Iterator[Reading]:
    """Choose how to read, and start helpers: they come up while the snapshot's index is read.

    Args:
        source: stays the caller's.
        targets: tensors that will be filled, for where most of their bytes are.
        options: how to read.
        kept: whose helpers and kernels to borrow, in place of some for this time only.
    """
    start = time.perf_counter()
    sizes: dict[torch.device, int] = {}
    for target in targets:
        size = 0 if is_lazy(target) else target.numel() * target.element_size()  # a lazy one is refused later
        sizes[target.device] = sizes.get(target.device, 0) + size
    gpus = [device for device in sizes if by_driver(device)]
    host = sum(size for device, size in sizes.items() if device.type == "cpu")
    staged = host < sum(sizes.values()) / 2
    with contextlib.closing(choose(source, options.route, staged=staged)) as reader, contextlib.ExitStack() as stack:
        helpers = None
        if staged and len(gpus) == 1 and options.processes and isinstance(source, FileSource | Files):
            helpers = stack.enter_context(_helpers(source, reader, options, gpus[0].index or 0, kept))
        yield Reading(reader, helpers, kept.kernels if kept is not None else None, time.perf_counter() - start)


@contextlib.contextmanager
def _helpers(
    source: FileSource | Files, reader: Reader, options: RestoreOptions, gpu: int, kept: KeptHelpers | None
) -> Iterator[Helpers | None]:
    """Near the GPU, if they are worth it; where they cannot be, threads do as well, slower."""
    with contextlib.closing(Context(gpu)) as context:
        cores = near(context.bus) or parallel.allowed_cores()
    running = kept is not None and kept.running(gpu)
    count = wanted(source, reader, options.workers, len(cores), running=running)
    helpers = None
    if count:
        with contextlib.suppress(OSError, RuntimeError):  # no memory, process or thread
            helpers = Helpers(gpu, count) if kept is None else kept.borrow(gpu)
    if helpers is None:
        yield None
        return
    try:
        with helpers.reading(source):
            yield helpers
    finally:
        if kept is None:
            helpers.close()
        else:
            kept.give_back(helpers)
