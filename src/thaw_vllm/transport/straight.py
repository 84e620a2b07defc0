"""Ranges copied to a GPU straight from memory that it reaches, many a call, and summed there while others arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from .checksum import damaged
from .cuda import Context, Stream
from .pipeline import Range
from .wordsum_cuda import CudaSums, Kernel

GROUP = 16
"""Ranges whose sums are asked for at once, while those after them arrive."""

Pieces = Callable[[int, int], list[tuple[int, int]]]
"""``pieces(offset, length)``: address and length of runs of memory, together that range of a source."""


def joined(ranges: Sequence[Range], runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Destination address, offset in the source and length of copies; neighbours in both, of one label, made one.

    Two tensors that lie side by side may be two allocations of the driver's, and no copy may cross from one to the
    other (CUDA_ERROR_INVALID_VALUE).
    """
    address = offset = length = 0
    label = ""
    for found, (begin, _) in zip(ranges, runs, strict=True):
        if length and (found.offset, begin, found.label) == (offset + length, address + length, label):
            length += found.length
            continue
        if length:
            yield address, offset, length
        address, offset, length, label = begin, found.offset, found.length, found.label
    if length:
        yield address, offset, length


def send(
    context: Context,
    name: str,
    ranges: Sequence[Range],
    runs: Sequence[tuple[int, int]],
    pieces: Pieces,
    copy: str,
    *,
    verify: bool,
    kernel: Kernel | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy ranges, and hold each against its word sum where it has arrived; returns when all are in place.

    Args:
        context: that GPU's; this thread is in it meanwhile.
        name: of the source, for messages.
        ranges: of the source.
        runs: address in the GPU's memory and bytes of each.
        pieces: where they come from.
        copy: the driver's call for it.
        verify: whether to check.
        kernel: that sums on this GPU, borrowed; None has one loaded.
        progress: called with the bytes of each group once they were asked for.

    Raises:
        CorruptionError: see ``pipeline.deliver``.
        DeviceError: the GPU or its driver refused.
    """
    call, results = context.driver.call, []
    groups = range(0, len(ranges), GROUP)
    with context.entered(), contextlib.ExitStack() as stack:
        sums = stack.enter_context(CudaSums(context, len(ranges), kernel)) if verify else None
        stream = stack.enter_context(contextlib.closing(Stream(context, events=len(groups))))
        for event, first in zip(stream.events, groups, strict=True):
            for address, offset, length in joined(ranges[first : first + GROUP], runs[first : first + GROUP]):
                for held, size in pieces(offset, length):
                    call(copy, address, held, size, stream.handle)
                    address += size
            call("cuEventRecord", event, stream.handle)
            if progress is not None:
                progress(sum(found.length for found in ranges[first : first + GROUP]))
        if sums is not None:  # asked for while the copies are under way
            for event, first in zip(stream.events, groups, strict=True):
                sums.after(event)
                sums.add(runs[first : first + GROUP])
            results = sums.results()
        stream.synchronize()
    for found, result in zip(ranges if verify else (), results, strict=True):
        if result != found.wordsum:
            raise damaged(name, found.label, found.offset, found.length)
