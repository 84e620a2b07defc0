"""From a module to an index and its storages: every tensor once, ties kept as ties."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import UnsupportedError
from ..format.index import BUFFER, PARAMETER, File, Index, Tensor
from ..transport.drain import Run
from ..transport.links import by_driver
from .layout import byte_view, check_storable, dense, dtype_name, extent, host_bytes, integers, ordered, runs, settle

Named = tuple[str, str, torch.Tensor]
"""Name, kind and tensor."""


class Storage(Protocol):
    """Where one storage's bytes come from while it is written.

    Attributes:
        length: bytes in all.
    """

    length: int

    def read(self, at: int, length: int) -> memoryview:
        """``length`` bytes from ``at``; safe from several threads, good until the same thread reads again."""

    def run(self, at: int, length: int) -> Run | None:
        """Where those bytes lie in a GPU's memory, in order and without gaps; None where they do not."""


class StorageBytes:
    """The bytes of one storage as they will be stored; borrows the tensor."""

    def __init__(self, tensor: torch.Tensor, stride: tuple[int, ...]) -> None:
        self._item = tensor.element_size()
        self._view = byte_view(tensor) if dense(tensor) else None
        self._ordered = ordered(integers(tensor), stride)
        self.length = self._ordered.numel() * self._item

    def read(self, at: int, length: int) -> memoryview:
        """``length`` bytes from ``at`` in host memory: the tensor's own where it lies there densely, else a copy."""
        if self._view is not None:
            return host_bytes(self._view[at : at + length].cpu())
        parts = runs(self._ordered, at // self._item, (at + length) // self._item)
        packed = torch.cat([part.reshape(-1) for part in parts]).cpu()
        return host_bytes(byte_view(packed))

    def run(self, at: int, length: int) -> Run | None:
        """See Storage."""
        if self._view is None or not by_driver(self._view.device):
            return None
        return Run(self._view.device.index, self._view.data_ptr() + at, length)


class HeldBytes:
    """A storage whose bytes are at hand (a carried file)."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.length = len(data)

    def read(self, at: int, length: int) -> memoryview:
        """``length`` bytes from ``at``."""
        return self._data[at : at + length]

    def run(self, at: int, length: int) -> Run | None:
        """They are in host memory."""
        return None


@dataclass(frozen=True)
class Captured:
    """An index; for each of its storages, where the bytes are; for each of its entries, the tensor."""

    index: Index
    storages: tuple[Storage, ...]
    tensors: tuple[torch.Tensor, ...]


def fillable(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Every parameter and buffer under every name, for a restore; and which of these names are parameters'."""
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False)), set(parameters)


def module_tensors(module: torch.nn.Module, also: Collection[str] = ()) -> list[Named]:
    """Parameters and persistent buffers under every name, and the non-persistent buffers in ``also``."""
    found: list[Named] = [(n, PARAMETER, p) for n, p in module.named_parameters(remove_duplicate=False)]
    persistent = persistent_buffers(module)
    found += [(n, BUFFER, b) for n, b in module.named_buffers(remove_duplicate=False) if n in persistent or n in also]
    return found


def persistent_buffers(module: torch.nn.Module) -> set[str]:
    """Names of the buffers that a state dict would hold."""
    names = set()
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def capture(named: Iterable[Named], files: Iterable[tuple[str, bytes]] = ()) -> Captured:
    """Lay tensors out as storages.

    Args:
        named: name, kind and tensor; names unique. Several may share memory: equal views, or views inside one
            tensor that covers them all.
        files: base name and content of the small files to carry.

    Returns:
        Borrows the tensors; they must not change until the snapshot is written.

    Raises:
        UnsupportedError: a tensor whose bytes are not the whole of it, or tensors that overlap in part.
    """
    given = list(named)
    for name, _, tensor in given:
        check_storable(name, tensor)
    settle(tensor for _, _, tensor in given)
    entries: list[Tensor] = []
    tensors: list[torch.Tensor] = []
    storages: list[Storage] = []
    placed: set[int] = set()
    groups = _overlapping(given)
    for position, (name, kind, tensor) in enumerate(given):
        if position in placed:
            continue
        if not tensor.numel():
            entries.append(Tensor(name, kind, dtype_name(tensor.dtype), tuple(tensor.shape), tensor.stride(), None))
            tensors.append(tensor)
            continue
        group = groups[position]
        placed.update(group)
        owner, stride = _owner([given[i] for i in group])
        number = len(storages)
        storages.append(StorageBytes(owner[2], stride))
        base = extent(owner[2])[0]
        for member in sorted((given[i] for i in group), key=lambda item: item is not owner):
            tensors.append(member[2])
            kept = stride if member[2].stride() == owner[2].stride() else member[2].stride()
            entries.append(
                Tensor(
                    member[0],
                    member[1],
                    dtype_name(member[2].dtype),
                    tuple(member[2].shape),
                    kept,
                    number,
                    member[2].data_ptr() - base,
                )
            )
    carried = []
    for name, data in files:
        carried.append(File(name, len(storages) if data else None))
        if data:
            storages.append(HeldBytes(data))
    index = Index(tuple(entries), tuple(s.length for s in storages), tuple(carried))
    return Captured(index, tuple(storages), tuple(tensors))


def _overlapping(given: list[Named]) -> dict[int, list[int]]:
    """For each tensor with elements, the tensors (itself included, in order) whose memory it touches, transitively."""
    spans = []
    for position, (_, _, tensor) in enumerate(given):
        if tensor.numel():
            low, high = extent(tensor)
            spans.append((str(tensor.device), low, high, position))
    spans.sort()
    groups: list[list[int]] = []
    device, end = "", -1
    for where, low, high, position in spans:
        if where == device and low < end:
            groups[-1].append(position)
        else:
            groups.append([position])
            end = high
        device, end = where, max(end, high)
    return {position: sorted(group) for group in groups for position in group}


def _owner(group: list[Named]) -> tuple[Named, tuple[int, ...]]:
    """The member that stands for the group's storage, and the stride its elements are stored with."""
    low = min(extent(t)[0] for _, _, t in group)
    high = max(extent(t)[1] for _, _, t in group)
    for item in group:
        tensor = item[2]
        if extent(tensor) == (low, high) and dense(tensor):
            return item, tensor.stride()
    first = group[0]
    if any(_view(t) != _view(first[2]) for _, _, t in group):
        names = ", ".join(repr(name) for name, _, _ in group[:4])
        raise UnsupportedError(
            f"{names} share memory and none of them covers the others without gaps; clone() them apart first"
        )
    return first, _packed(first[2])


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _packed(tensor: torch.Tensor) -> tuple[int, ...]:
    """Row-major strides for the elements of a tensor that leaves gaps; repeated dimensions keep stride 0."""
    stride, step = [0] * tensor.dim(), 1
    for dim in reversed(range(tensor.dim())):
        size, repeated = tensor.shape[dim], tensor.shape[dim] > 1 and tensor.stride(dim) == 0
        if not repeated:
            stride[dim] = step
            step *= size
    return tuple(stride)
