"""How a torch tensor's elements map to the bytes of a storage, and back, without a copy where there need be none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from torch.nn.parameter import is_lazy

from ..errors import UnsupportedError
from ..format.dtypes import ITEM_SIZE

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without ``torch.``, whether storable or not."""
    return str(dtype).removeprefix("torch.")


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose bytes are not the whole of it.

    Raises:
        UnsupportedError: sparse, nested, quantised, lazily conjugated or negated, a wrapper subclass, not initialised,
            on ``meta``, or with its memory freed; or a machine that stores numbers another way round.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("a snapshot holds little-endian numbers, and this machine is big-endian")
    if is_lazy(tensor):
        raise UnsupportedError(f"{name!r} is not initialised yet; run the module once first")
    if tensor.device.type == "meta":
        raise UnsupportedError(f"{name!r} is on the meta device and has no bytes; materialise it with to_empty() first")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedError(
            f"{name!r} is a {type(tensor).__name__}, which wraps other tensors; freeze the checkpoint it was made from"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise UnsupportedError(f"{name!r} has the layout {layout}; convert it to a dense tensor first")
    if dtype_name(tensor.dtype) not in ITEM_SIZE or tensor.is_quantized:
        raise UnsupportedError(f"{name!r} has the dtype {tensor.dtype}, which a snapshot cannot hold")
    if tensor.is_conj() or tensor.is_neg():
        raise UnsupportedError(f"{name!r} is a lazy conjugate or negative; call resolve_conj().resolve_neg() first")
    if tensor.numel():
        low, high = extent(tensor)
        stop = tensor.storage_offset() * tensor.element_size() + high - low
        if not tensor.data_ptr() or stop > tensor.untyped_storage().nbytes():
            raise UnsupportedError(f"{name!r} has no memory of its own at present (freed, sharded or offloaded)")


def settle(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until every device of ``tensors`` has done what was asked of it on any stream; starts its context too.

    Other threads copy on streams of their own, which know nothing of work still queued on the caller's.
    """
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def unrepeated(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its repeated (stride 0) dimensions cut to one element."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and step == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def memory_order(stride: tuple[int, ...]) -> list[int]:
    """Dimensions from the largest step to the smallest."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one range of memory without gap or overlap, in whatever order of dimensions."""
    if tensor.is_contiguous():  # nearly all are, and asking is quick
        return True
    once = unrepeated(tensor)
    return once.permute(memory_order(once.stride())).is_contiguous()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and just after the last one that the elements touch."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor as uint8, shape ``(bytes,)``, on its device, sharing its memory."""
    once = unrepeated(tensor)
    size = once.numel() * once.element_size()
    offset = once.storage_offset() * once.element_size()
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(once.untyped_storage(), offset, (size,), (1,))


def host_bytes(view: torch.Tensor) -> memoryview:
    """A uint8 host tensor's memory, without a copy; keeps the tensor alive."""
    return memoryview(view.numpy()).cast("B")  # type: ignore[arg-type]


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``'s memory as integers of the same size: torch copies those for every dtype, and bit for bit.

    Elements of 16 bytes have no such integers and stay as they are.
    """
    return tensor.detach().view(_INTEGERS.get(tensor.element_size(), tensor.dtype))


def ordered(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """``tensor`` seen in the order in which a storage with ``stride`` holds its elements, each once."""
    for dim, (size, step) in enumerate(zip(tensor.shape, stride, strict=True)):
        if size > 1 and step == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.permute(memory_order(stride))


def runs(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Views of ``tensor`` that together are its elements ``start`` to ``stop`` in row-major order, in that order.

    Works for any strides; at most two partial views for each dimension and one whole block.
    """
    if start >= stop:
        return
    if tensor.dim() == 0 or (start == 0 and stop == tensor.numel()):
        yield tensor
        return
    if tensor.dim() == 1:
        yield tensor[start:stop]
        return
    row = tensor.numel() // tensor.shape[0]
    first, last = start // row, stop // row
    if first == last:
        yield from runs(tensor[first], start - first * row, stop - first * row)
        return
    if start % row:
        yield from runs(tensor[first], start % row, row)
        first += 1
    if first < last:
        yield tensor[first:last]
    if stop % row:
        yield from runs(tensor[last], 0, stop % row)
