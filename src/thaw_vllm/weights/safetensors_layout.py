"""Which safetensors files a snapshot's tensors become: shards, headers, and the index over them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from typing import Any

from ..errors import UnsupportedError
from ..format.document import canonical, dump
from ..format.dtypes import ITEM_SIZE
from ..format.index import Tensor
from .checkpoint import MAX_HEADER, SAFETENSORS_DTYPES

SHARD = 5_000_000_000
"""Bytes of tensors in one file, as transformers splits them."""

SAFETENSORS_NAMES = {torch_name: name for name, torch_name in SAFETENSORS_DTYPES.items()}


_MAX_ELEMENTS = (1 << 56) - 1
"""Of any leading part of a shape: the safetensors library multiplies them up, then by 8 bits an element."""


def shards(tensors: Iterable[Tensor], limit: int) -> dict[str, list[Tensor]]:
    """Tensors by file name (transformers' names), in their order, at most ``limit`` bytes a file or one tensor.

    Within a file the widest elements stand first, so that all are aligned to their size.
    """
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    for group in groups:
        group.sort(key=lambda tensor: -ITEM_SIZE[tensor.dtype])
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def header(name: str, tensors: list[Tensor], metadata: dict[str, str]) -> bytes:
    """What stands before the tensors of the file ``name``: its length in eight bytes, JSON, spaces to align them.

    Raises:
        UnsupportedError: longer than the safetensors library reads, or an empty tensor of a size it cannot count.
    """
    document: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for tensor in tensors:
        end = at + tensor.bytes
        if any(n > _MAX_ELEMENTS for n in accumulate(tensor.shape, mul)):
            raise UnsupportedError(f"{tensor.name!r} has the shape {tensor.shape}, which safetensors cannot count")
        kind = SAFETENSORS_NAMES[tensor.dtype]
        document[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = dump(document)
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > MAX_HEADER:
        raise UnsupportedError(f"{name!r} would need a header of {len(text)} bytes, safetensors allows {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def index_document(files: dict[str, list[Tensor]], total: int) -> bytes:
    """``model.safetensors.index.json``: which file holds each of the tensors, ``total`` bytes of them."""
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    return canonical({"metadata": {"total_size": total}, "weight_map": weight_map})
