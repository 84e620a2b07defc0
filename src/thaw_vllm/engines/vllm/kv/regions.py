"""The memory of which every block has a page, and pages on their way out of it and into it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from ....errors import UnsupportedError
from ....format.kv import Region
from ....transport.cuda import Context
from ....transport.links import by_driver
from ....weights.layout import dtype_name
from .. import versions

_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
"""A page is moved in the longest of these that divides its size and place: a GPU takes as long for a byte as for 8."""
_PIECE = 64 << 20
"""Bytes that are scattered at once where they pass through host memory."""


def regions(worker: Any, blocks: int) -> list[tuple[Region, torch.Tensor]]:
    """The memory of which every block has a page: what it is, and its words, of any integer type, a row a block.

    Layers of several groups may share memory; it is listed once.

    Args:
        blocks: of the pool; the first dimension of every tensor, or a divisor of it.

    Raises:
        UnsupportedError: a tensor that is laid out in no way known here.
    """
    found: list[tuple[Region, torch.Tensor]] = []
    seen: set[tuple[int, int, int]] = set()
    for layer, tensors in versions.kv_tensors(worker).items():
        for number, tensor in enumerate(tensors):
            if tensor.shape[0] % blocks:
                raise UnsupportedError(
                    f"the KV cache of {layer!r} has {tensor.shape[0]} rows for {blocks} blocks: a layout not known here"
                )
            if tensor.shape[0] != blocks:  # the kernel's blocks are parts of the manager's
                tensor = tensor.unflatten(0, (blocks, -1))  # type: ignore[no-untyped-call]
            item, shape, stride = tensor.element_size(), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
            step = tensor.stride(0) * item
            page = item * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))
            if page != math.prod(shape) * item or page > step:
                raise UnsupportedError(f"the KV cache of {layer!r} has blocks with gaps; this layout is not known")
            place = (tensor.data_ptr(), step, page)
            if place in seen:
                continue
            seen.add(place)
            region = Region(f"{layer}#{number}", dtype_name(tensor.dtype), shape, stride, page)
            found.append((region, _words(tensor, blocks, page, step)))
    if not found:
        raise UnsupportedError("this engine has no KV cache that thaw knows")
    return found


def _words(tensor: torch.Tensor, blocks: int, page: int, step: int) -> torch.Tensor:
    """``page`` bytes from the beginning of each block of a tensor, blocks ``step`` bytes apart."""
    begin = tensor.storage_offset() * tensor.element_size()
    numbers = (tensor.untyped_storage().data_ptr(), begin, page, step)
    word = next(word for word in _WORDS if all(number % word.itemsize == 0 for number in numbers))
    raw = torch.empty(0, dtype=word, device=tensor.device)
    size = word.itemsize
    return raw.set_(tensor.untyped_storage(), begin // size, (blocks, page // size), (step // size, 1))


def page_of(view: torch.Tensor) -> int:
    """Bytes of a row of a view that ``regions`` gave."""
    return view.shape[1] * view.element_size()


def rows(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Numbers of rows, for ``gather`` and ``scatter``, int64."""
    return torch.tensor(numbers, dtype=torch.long, device=device)


def gather(view: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Pages of blocks ``ids``, one after another, into ``out``: uint8, on the same device."""
    torch.index_select(view, 0, ids, out=out.view(view.dtype).view(len(ids), -1))


def scatter(view: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor | None, ids: torch.Tensor) -> None:
    """``pages[slots[i]]`` to block ``ids[i]``; pages may be on the host.

    Args:
        pages: uint8, ``(slots, page)``.
        slots: on the pages' device; None for all of them in their order.
        ids: on the view's device.
    """
    words = pages.view(view.dtype)
    if words.device == view.device:
        view.index_copy_(0, ids, words if slots is None else words.index_select(0, slots))
        return
    at = max(1, _PIECE // page_of(view))
    for first in range(0, len(ids), at):
        part = words[first : first + at] if slots is None else words.index_select(0, slots[first : first + at])
        view.index_copy_(0, ids[first : first + at], part.to(view.device))


class _Given:
    """Device memory as torch takes it from others: numba's CUDA array interface, version 3."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


@contextlib.contextmanager
def scratch(size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Bytes that are gone afterwards, views of them too.

    A GPU's come from the driver: torch's allocator would keep what was returned to it, and nobody else could use it.

    Raises:
        DeviceError: there is no room.
    """
    if not size or not by_driver(device):
        yield torch.empty(size, dtype=torch.uint8, device=device)
        return
    with contextlib.closing(Context(device.index or 0)) as context, context.entered():
        address = context.driver.made("cuMemAlloc_v2", size)
        try:
            yield torch.as_tensor(_Given(address, size), device=device)
        finally:
            torch.cuda.current_stream(device).synchronize()
            context.driver["cuMemFree_v2"](address)
