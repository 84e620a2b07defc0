"""A file of KV blocks, held against the rules of its table and its pages, and the table read."""

from __future__ import annotations

from ..errors import FormatError, MismatchError
from ..format.header import Header
from ..format.index import TENSOR, Tensor
from ..format.kv import EXTRA, HASHES, PAGES, PARENTS, SLOTS, TOKENS, Layout
from ..weights.open import Opened
from ..weights.read_storage import filled
from .table import Table, check_shapes

_TABLE = {TOKENS: "int32", PARENTS: "int32", SLOTS: "int32", HASHES: "uint8", EXTRA: "uint8"}


def read_table(opened: Opened) -> Table:
    """Of rank 0's file, its chunks read too.

    Raises:
        MismatchError: the file holds weights, or is another rank's.
        FormatError, CorruptionError: its table is not sound, or its page tensors are not.
    """
    snapshot, name = opened.snapshot, opened.source.name
    slots = count_slots(opened)
    parallel = snapshot.header.identity.parallel
    if parallel.rank:
        raise MismatchError(
            f"{name!r} holds pages of {parallel} and no table of blocks; give the manifest's path (rank 0's file)"
        )
    layout = _layout(opened)
    found = {tensor.name: tensor for tensor in snapshot.index.tensors if tensor.name in _TABLE}
    try:
        # Before a byte is read.
        check_shapes(layout.block_size, len(layout.groups), {name: t.shape for name, t in found.items()})
        tensors = {name: (t.shape, filled(snapshot, opened.source, t.storage)) for name, t in found.items()}
        return Table.decode(layout, tensors, slots)
    except FormatError as error:
        if repr(name) in str(error):
            raise
        raise type(error)(f"{name!r}: {error}") from None


def count_slots(opened: Opened) -> int:
    """Pages of each region, of any rank's file, once its tensors are known to be those of its layout.

    Raises:
        MismatchError: the file holds weights.
        FormatError: a tensor too many or too few, or of another form.
    """
    layout, index, name = _layout(opened), opened.snapshot.index, opened.source.name
    table = _TABLE if opened.snapshot.header.identity.parallel.rank == 0 else {}
    pages = {PAGES + region.name: region.page for region in layout.regions}
    if index.ties:
        raise FormatError(f"{name!r}: {next(iter(index.ties))} shares its memory, which tensors of KV blocks may not")
    names = {tensor.name for tensor in index.tensors}
    if names - set(table) != set(pages):
        other = min(names - set(table) ^ set(pages))
        raise FormatError(f"{name!r}: its tensors are not those of its regions; {other} is missing or too much")
    slots: set[int] = set()
    for tensor in index.tensors:
        wanted = table.get(tensor.name, "uint8")
        if tensor.dtype != wanted or tensor.kind != TENSOR or not _row_major(tensor):
            raise FormatError(f"{name!r}: {tensor.name} must be a row-major tensor of {wanted}")
        if tensor.name in table:
            continue
        if len(tensor.shape) != 2 or tensor.shape[1] != pages[tensor.name]:
            raise FormatError(f"{name!r}: the pages of {tensor.name} must have {pages[tensor.name]} bytes")
        slots.add(tensor.shape[0])
    if len(slots) != 1:
        raise FormatError(f"{name!r}: its page tensors differ in length")
    return slots.pop()


def freeze_of(header: Header) -> str:
    """Which freeze made a file: the same for every rank of a set, and for no other file of other pages."""
    return header.ranks.id if header.ranks is not None else header.content


def _layout(opened: Opened) -> Layout:
    layout = opened.snapshot.header.kv
    if layout is None:
        raise MismatchError(f"{opened.source.name!r} holds weights, not KV blocks")
    return layout


def _row_major(tensor: Tensor) -> bool:
    """Whether its elements lie one after another, none of them twice."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size > 1 and stride != step:
            return not tensor.elements
        step *= size
    return True
