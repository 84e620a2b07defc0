"""The table of blocks: a forest of prefixes, each block with its parent, its tokens, and where its pages are."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import FormatError, UnsupportedError
from ..format.document import canonical, mapping, parse, printable, text
from ..format.identity import Identity
from ..format.kv import (
    EXTRA,
    HASHES,
    MAX_BLOCKS,
    MAX_EXTRA,
    MAX_HASH,
    MAX_TOKENS,
    PARENTS,
    SLOTS,
    TOKENS,
    Layout,
)

NONE = -1
"""No parent, or no page of a group."""
MAX_SALT = 4096
TOKEN_BYTES = 4
_UNSALTED = canonical({})


class Block(NamedTuple):
    """One block of a prefix.

    Attributes:
        parent: position of the block before it in the table, below its own; NONE for a first block.
        tokens: ``block_size`` token ids.
        slots: for each group, the position of its page in the page tensors; NONE where that group keeps none.
        hash: the freezing engine's, for the record.
        salt: the cache salt of its requests, on a first block only.
    """

    parent: int
    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    hash: bytes = b""
    salt: str | None = None


@dataclass(frozen=True)
class Table:
    """Blocks, parents before children."""

    block_size: int
    groups: int
    blocks: tuple[Block, ...] = ()

    @property
    def slots(self) -> int:
        """Pages of each region."""
        return max((slot for block in self.blocks for slot in block.slots), default=NONE) + 1

    def leaves(self) -> list[int]:
        """Positions of the blocks that no other continues, longest prefix first."""
        parents = {block.parent for block in self.blocks}
        depths = self.depths()
        found = [number for number in range(len(self.blocks)) if number not in parents]
        return sorted(found, key=lambda number: (-depths[number], number))

    def depths(self) -> list[int]:
        """Blocks of each prefix, itself included."""
        found: list[int] = []
        for block in self.blocks:
            found.append(1 + (found[block.parent] if block.parent != NONE else 0))
        return found

    def chain(self, number: int) -> list[int]:
        """Positions from the first block of a prefix to the one at ``number``."""
        found = []
        while number != NONE:
            found.append(number)
            number = self.blocks[number].parent
        return found[::-1]

    def tokens(self, number: int) -> list[int]:
        """Every token of the prefix that ends with a block."""
        return [token for at in self.chain(number) for token in self.blocks[at].tokens]

    def encode(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Tensors by name: dtype, shape, and bytes, little-endian.

        Raises:
            UnsupportedError: a table, or a salt, that no reader would take.
        """
        count = len(self.blocks)
        found = {
            TOKENS: ("int32", (count, self.block_size), packed(t for b in self.blocks for t in b.tokens)),
            PARENTS: ("int32", (count,), packed(b.parent for b in self.blocks)),
            SLOTS: ("int32", (count, self.groups), packed(s for b in self.blocks for s in b.slots)),
        }
        length = max((len(b.hash) for b in self.blocks), default=0)
        if length:
            data = b"".join(b.hash.ljust(length, b"\0") for b in self.blocks)
            found[HASHES] = ("uint8", (count, length), data)
        salts = {str(number): {"salt": b.salt} for number, b in enumerate(self.blocks) if b.salt is not None}
        if salts:
            extra = json.dumps(salts, ensure_ascii=True).encode()
            found[EXTRA] = ("uint8", (len(extra),), extra)
        try:
            check_shapes(self.block_size, self.groups, {name: shape for name, (_, shape, _) in found.items()})
            _salts(found[EXTRA][2] if salts else b"{}")
        except FormatError as error:
            raise UnsupportedError(f"a snapshot cannot hold these blocks: {error}") from None
        return found

    @classmethod
    def decode(cls, layout: Layout, tensors: Mapping[str, tuple[tuple[int, ...], bytes]], slots: int) -> Table:
        """Checked: sizes that agree, parents before children, slots inside the page tensors, salts on first blocks.

        Args:
            layout: of the file.
            tensors: shape and verified bytes of the table's tensors, by name.
            slots: pages of each region.

        Raises:
            FormatError: what docs/format.md, section 16, does not allow.
        """
        groups, size = len(layout.groups), layout.block_size
        check_shapes(size, groups, {name: shape for name, (shape, _) in tensors.items()})
        for name, (shape, data) in tensors.items():
            wanted = math.prod(shape) * (1 if name in (HASHES, EXTRA) else 4)
            if len(data) != wanted:
                raise FormatError(f"{name}: {len(data)} bytes, its shape {list(shape)} needs {wanted}")
        tokens, parents, places = (_unpacked(tensors[name][1]) for name in (TOKENS, PARENTS, SLOTS))
        shape, hashes = tensors.get(HASHES, ((0, 0), b""))
        length = shape[1]
        salts = _salts(tensors[EXTRA][1]) if EXTRA in tensors else {}
        for number, parent in enumerate(parents):
            if not NONE <= parent < number:
                raise FormatError(f"block {number}: its parent {parent} does not come before it")
        if min(places, default=NONE) < NONE or max(places, default=NONE) >= slots:
            at, slot = next((at, slot) for at, slot in enumerate(places) if not NONE <= slot < slots)
            raise FormatError(f"block {at // groups}: slot {slot} is not below {slots}")
        if not tensors[TOKENS][1][3::4].isascii():  # the highest bit of each, which is its sign
            at = next(at for at, token in enumerate(tokens) if token < 0)
            raise FormatError(f"block {at // size}: a token id below 0")
        blocks = []
        by_block = zip(*[iter(tokens)] * size, strict=True), zip(*[iter(places)] * groups, strict=True)
        for number, (parent, ids, own) in enumerate(zip(parents, *by_block, strict=True)):
            salt = salts.pop(number, None) if salts else None
            if salt is not None and parent != NONE:
                raise FormatError(f"block {number}: only a first block has a salt")
            blocks.append(Block(parent, ids, own, hashes[number * length : (number + 1) * length], salt))
        if salts:
            raise FormatError(f"{EXTRA}: there is no block {min(salts)}")
        return cls(size, groups, tuple(blocks))


def check_shapes(block_size: int, groups: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many blocks a table has, from its tensors' shapes, before their bytes are read.

    Raises:
        FormatError: one is missing, they disagree, or there are more blocks than may be held.
    """
    for name in (TOKENS, PARENTS, SLOTS):
        if name not in shapes:
            raise FormatError(f"{name} is missing")
    count = shapes[PARENTS][0] if shapes[PARENTS] else 0
    if count > MAX_BLOCKS or count * block_size > MAX_TOKENS:
        raise FormatError(
            f"{PARENTS}: {count} blocks of {block_size} tokens are too many; the limit is {MAX_BLOCKS} blocks with "
            f"{MAX_TOKENS} tokens in all"
        )
    for name, wanted in ((PARENTS, (count,)), (TOKENS, (count, block_size)), (SLOTS, (count, groups))):
        if shapes[name] != wanted:
            raise FormatError(f"{name}: its shape must be {list(wanted)}")
    hashes, extra = shapes.get(HASHES, (count, 0)), shapes.get(EXTRA, (0,))
    if len(hashes) != 2 or hashes[0] != count or hashes[1] > MAX_HASH:
        raise FormatError(f"{HASHES}: its shape must begin with {count}, and end with at most {MAX_HASH}")
    if len(extra) != 1 or extra[0] > MAX_EXTRA:
        raise FormatError(f"{EXTRA}: its shape must be of one dimension, at most {MAX_EXTRA}")
    return count


def storable(salt: str) -> bool:
    """Whether a file can hold this cache salt."""
    return len(salt) <= MAX_SALT and printable(salt)


def root(identity: Identity, layout: Layout) -> bytes:
    """What the addresses of first blocks are hashed after: the weights and everything that shapes keys and values."""
    known = [identity.model, identity.config, identity.dtype, identity.quantization]
    return hashlib.sha256(canonical([*known, layout.cache_dtype, layout.block_size])).digest()


def address(parent: bytes, tokens: bytes, salt: str | None = None) -> bytes:
    """The address of a block: SHA-256 over its parent's (``root`` for a first one), its tokens and its salt.

    Ours, so that it says the same everywhere: an engine's own block hashes differ between versions and processes.

    Args:
        tokens: as ``packed`` gives them.
    """
    extra = _UNSALTED if salt is None else canonical({"salt": salt})
    return hashlib.sha256(parent + tokens + extra).digest()


def addresses(table: Table, base: bytes) -> list[bytes]:
    """The address of each block."""
    found: list[bytes] = []
    for block in table.blocks:
        parent = base if block.parent == NONE else found[block.parent]
        found.append(address(parent, packed(block.tokens), block.salt))
    return found


@dataclass
class Builder:
    """Collects chains of blocks into a table, each block once."""

    block_size: int
    groups: int
    _blocks: list[Block] = field(default_factory=list)
    _known: dict[tuple[int, tuple[int, ...], str | None], int] = field(default_factory=dict)

    def add(self, parent: int, tokens: tuple[int, ...], slots: tuple[int, ...], hash_: bytes, salt: str | None) -> int:
        """The position of a block, which is added if it is not there."""
        key = (parent, tokens, salt)
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self._blocks)
            self._blocks.append(Block(parent, tokens, slots, hash_, salt))
        return number

    def table(self) -> Table:
        """What was collected."""
        return Table(self.block_size, self.groups, tuple(self._blocks))


def packed(numbers: Iterable[int]) -> bytes:
    """Token ids and the like as files hold them: int32, little-endian."""
    found = array("i", numbers)
    assert found.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _unpacked(data: bytes) -> array[int]:
    found = array("i")
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _salts(data: bytes) -> dict[int, str]:
    found = {}
    for key, value in parse(data, EXTRA).items():
        if not key.isascii() or not key.isdigit() or len(key) > 8 or key != str(int(key)):
            raise FormatError(f"{EXTRA}: {key[:40]!r} is no block's number")
        salt = mapping(value, f"{EXTRA}[{key}]").get("salt")
        found[int(key)] = text(salt, f"{EXTRA}[{key}].salt", MAX_SALT)
    return found
