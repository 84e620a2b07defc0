"""The index: tensors as views of storages, and the small files that travel with them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError
from .document import JSONObject, array, integer, mapping, text
from .dtypes import ITEM_SIZE
from .limits import MAX_BYTES, MAX_CHUNKS, MAX_FILE, MAX_FILES, MAX_NAME, MAX_RANK, MAX_RANKS, MAX_TENSORS

PARAMETER = "parameter"
BUFFER = "buffer"
TENSOR = "tensor"
"""A tensor that is neither: of a plain checkpoint, or one freed from its module."""
KINDS = (PARAMETER, BUFFER, TENSOR)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NO_CODE = re.compile(r".*\.(py|pyc|pyd|so|dll|dylib|sh|exe|bat|pkl|pickle|pt|pth|bin)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named view of a storage.

    Attributes:
        name: as in ``named_parameters``/``named_buffers``; unique in the snapshot.
        kind: ``parameter``, ``buffer`` or ``tensor``.
        dtype: torch's name without ``torch.``.
        shape: elements per dimension; ``()`` for a scalar.
        stride: elements between neighbours of each dimension, in the storage as stored.
        storage: number of the storage, or None when the tensor has no elements.
        offset: bytes from the storage's start to the first element.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int | None
    offset: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, counted once each."""
        return self.elements * ITEM_SIZE[self.dtype]

    @property
    def extent(self) -> int:
        """Bytes from the first to just after the last element in the storage."""
        if not self.elements:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class File:
    """A small file carried for the engine (config, tokenizer); a plain name and never code.

    Attributes:
        name: a base name such as ``tokenizer.json``.
        storage: number of the storage with its bytes, or None when it is empty.
    """

    name: str
    storage: int | None


@dataclass(frozen=True, slots=True)
class Kept:
    """A storage whose bytes are in another rank's file of the set, and not in this one.

    Attributes:
        storage: number of the storage here.
        rank: whose file has the bytes; a lower one than this file's.
        there: number of the storage there.
    """

    storage: int
    rank: int
    there: int


@dataclass(frozen=True, slots=True)
class Index:
    """Tensors in order of capture, carried files, the length of every storage in bytes, and what is kept elsewhere."""

    tensors: tuple[Tensor, ...]
    storages: tuple[int, ...]
    files: tuple[File, ...] = ()
    kept: tuple[Kept, ...] = ()

    @property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """Names that share a storage: the first tensor of it → the others, in order."""
        owners: dict[int, list[str]] = {}
        for tensor in self.tensors:
            if tensor.storage is not None:
                owners.setdefault(tensor.storage, []).append(tensor.name)
        return {names[0]: tuple(names[1:]) for names in owners.values() if len(names) > 1}

    def to_json(self) -> JSONObject:
        """The document of docs/format.md, section 4."""
        document: JSONObject = {
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "stride": list(t.stride),
                    "storage": t.storage,
                    "offset": t.offset,
                }
                for t in self.tensors
            ],
            "storages": list(self.storages),
            "files": [{"name": f.name, "storage": f.storage} for f in self.files],
        }
        if self.kept:
            document["kept"] = [{"storage": k.storage, "rank": k.rank, "there": k.there} for k in self.kept]
        return document


def plain_file_name(name: str) -> bool:
    """Whether ``name`` may be carried: a base name of letters, digits, ``._-``, and not one that programs execute."""
    return bool(_FILE_NAME.fullmatch(name)) and ".." not in name and not _NO_CODE.fullmatch(name)


def from_json(document: JSONObject) -> Index:
    """Check a parsed index document.

    Raises:
        FormatError: anything docs/format.md, section 4, does not allow; the message names the entry.
    """
    storages = tuple(
        integer(n, f"storages[{i}]", 1, MAX_BYTES)
        for i, n in enumerate(array(document.get("storages"), "storages", MAX_CHUNKS))
    )
    tensors = tuple(
        _tensor(mapping(entry, f"tensors[{i}]"), f"tensors[{i}]", storages)
        for i, entry in enumerate(array(document.get("tensors"), "tensors", MAX_TENSORS))
    )
    files = tuple(
        _file(mapping(entry, f"files[{i}]"), f"files[{i}]", storages)
        for i, entry in enumerate(array(document.get("files", []), "files", MAX_FILES))
    )
    _unique([t.name for t in tensors], "tensors")
    _unique([f.name for f in files], "files")
    _covered(tensors, files, storages)
    return Index(tensors, storages, files, _kept(document.get("kept", []), files, storages))


def _tensor(entry: JSONObject, where: str, storages: tuple[int, ...]) -> Tensor:
    name = text(entry.get("name"), f"{where}.name", MAX_NAME)
    if not name or len(name.encode()) > MAX_NAME:
        raise FormatError(f"{where}.name must have 1 to {MAX_NAME} bytes")
    where = f"tensor {name[:80]!r}"
    kind = text(entry.get("kind"), f"{where}: kind")
    if kind not in KINDS:
        raise FormatError(f"{where}: kind {kind[:40]!r} is none of {', '.join(KINDS)}")
    dtype = text(entry.get("dtype"), f"{where}: dtype")
    if dtype not in ITEM_SIZE:
        raise FormatError(f"{where}: dtype {dtype[:40]!r} is not known to this reader")
    shape = _sizes(entry.get("shape"), f"{where}: shape")
    stride = _sizes(entry.get("stride"), f"{where}: stride")
    if len(shape) != len(stride):
        raise FormatError(f"{where}: shape has {len(shape)} dimensions and stride {len(stride)}")
    if math.prod(shape) > MAX_BYTES:
        raise FormatError(f"{where}: more than {MAX_BYTES} elements")
    storage = entry.get("storage")
    if storage is not None:
        storage = integer(storage, f"{where}: storage", 0, len(storages) - 1)
    tensor = Tensor(name, kind, dtype, shape, stride, storage, integer(entry.get("offset", 0), f"{where}: offset"))
    if (storage is None) != (tensor.elements == 0):
        raise FormatError(f"{where}: a storage belongs to a tensor exactly when it has elements")
    if storage is None:
        if tensor.offset:
            raise FormatError(f"{where}: an offset without a storage")
        return tensor
    if tensor.offset % ITEM_SIZE[dtype]:
        raise FormatError(f"{where}: offset {tensor.offset} is not a multiple of its element size")
    if tensor.offset + tensor.extent > storages[storage]:
        raise FormatError(
            f"{where}: bytes {tensor.offset} to {tensor.offset + tensor.extent} lie outside its storage of "
            f"{storages[storage]} bytes"
        )
    return tensor


def _file(entry: JSONObject, where: str, storages: tuple[int, ...]) -> File:
    name = text(entry.get("name"), f"{where}.name")
    if not plain_file_name(name):
        raise FormatError(f"{where}: {name[:80]!r} is not a plain file name that may be carried")
    storage = entry.get("storage")
    if storage is not None:
        storage = integer(storage, f"{where}.storage", 0, len(storages) - 1)
        if storages[storage] > MAX_FILE:
            raise FormatError(f"{where}: {name!r} has {storages[storage]} bytes, at most {MAX_FILE} may be carried")
    return File(name, storage)


def _kept(value: Any, files: tuple[File, ...], storages: tuple[int, ...]) -> tuple[Kept, ...]:
    filed = {file.storage for file in files}
    found: list[Kept] = []
    for i, entry in enumerate(array(value, "kept", MAX_CHUNKS)):
        entry, where = mapping(entry, f"kept[{i}]"), f"kept[{i}]"
        number = integer(entry.get("storage"), f"{where}.storage", 0, len(storages) - 1)
        rank = integer(entry.get("rank"), f"{where}.rank", 0, MAX_RANKS)
        found.append(Kept(number, rank, integer(entry.get("there"), f"{where}.there", 0, MAX_CHUNKS)))
        if number in filed:
            raise FormatError(f"{where}: storage {number} is a carried file's, which is never kept elsewhere")
        if i and number <= found[i - 1].storage:
            raise FormatError(f"{where}: storage {number} does not come after storage {found[i - 1].storage}")
    if len({(kept.rank, kept.there) for kept in found}) != len(found):
        raise FormatError("kept: two storages are kept in one")
    return tuple(found)


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    return tuple(integer(n, where) for n in array(value, where, MAX_RANK))


def _unique(names: list[str], where: str) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise FormatError(f"{where}: the name {name[:80]!r} stands twice")
            seen.add(name)


def _covered(tensors: tuple[Tensor, ...], files: tuple[File, ...], storages: tuple[int, ...]) -> None:
    """Every storage belongs to one file, or its first tensor is dense from its first byte to its last."""
    first: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.storage is not None:
            first.setdefault(tensor.storage, tensor)
    filed = [f.storage for f in files if f.storage is not None]
    if len(set(filed)) != len(filed) or any(number in first for number in filed):
        raise FormatError("files: a storage belongs to two owners")
    for number, length in enumerate(storages):
        owner = first.get(number)
        if owner is None:
            if number not in filed:
                raise FormatError(f"storage {number} belongs to no tensor and no file")
        elif not (owner.offset == 0 and covers(owner, length)):
            raise FormatError(f"tensor {owner.name[:80]!r} does not cover its storage of {length} bytes densely")


def covers(tensor: Tensor, length: int) -> bool:
    """Whether ``tensor``, repeated (stride 0) dimensions counted once, fills ``length`` bytes without gap."""
    expected = 1
    dims = [(step, size) for size, step in zip(tensor.shape, tensor.stride, strict=True) if size > 1 and step > 0]
    for step, size in sorted(dims):
        if step != expected:
            return False
        expected *= size
    return expected * ITEM_SIZE[tensor.dtype] == length
