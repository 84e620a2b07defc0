"""The table of blocks of a file of KV blocks, read and verified."""

from __future__ import annotations

from ..errors import FormatError, MismatchError
from ..format.kv import EXTRA, HASHES, PAGES, PARENTS, SLOTS, TOKENS
from ..weights.open import Opened
from ..weights.read_storage import filled
from .table import Table


def read_table(opened: Opened) -> Table:
    """Of rank 0's file.

    Raises:
        MismatchError: the file holds weights.
        FormatError, CorruptionError: its table is not sound.
    """
    snapshot, name = opened.snapshot, opened.source.name
    layout = snapshot.header.kv
    if layout is None:
        raise MismatchError(f"{name!r} holds weights, not KV blocks")
    tensors = {}
    pages = {}
    for tensor in snapshot.index.tensors:
        if tensor.name in (TOKENS, PARENTS, SLOTS, HASHES, EXTRA):
            wanted = "uint8" if tensor.name in (HASHES, EXTRA) else "int32"
            if tensor.dtype != wanted or tensor.kind != "tensor":
                raise FormatError(f"{name!r}: {tensor.name} must be of {wanted}")
            data = filled(snapshot, opened.source, tensor.storage) if tensor.storage is not None else b""
            tensors[tensor.name] = tensor.shape, data
        else:
            pages[tensor.name] = tensor
    slots = {tensor.shape[0] for tensor in pages.values() if len(tensor.shape) == 2}
    if set(pages) != {PAGES + region.name for region in layout.regions} or len(slots) != 1:
        raise FormatError(f"{name!r}: its page tensors are not those of its regions, or differ in length")
    for region in layout.regions:
        if pages[PAGES + region.name].shape[1:] != (region.page,):
            raise FormatError(f"{name!r}: pages of {region.name!r} must have {region.page} bytes")
    return Table.decode(layout, tensors, slots.pop())
