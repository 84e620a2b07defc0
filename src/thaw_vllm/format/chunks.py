"""The chunk table: which bytes of which storage lie where in the payload, with two checksums of the original bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .preamble import CHUNK_RECORD

_RECORD = struct.Struct("<QQIIIHHQQ")
assert _RECORD.size == CHUNK_RECORD

RAW = 0
"""Codec 0: the stored bytes are the original bytes."""
PLANES = 1
"""Codec 1: planes of bytes, entropy-coded (docs/format.md, section 17; ``codecs.planes``)."""
KEPT = 2
"""Codec 2: no stored bytes here; another rank's file of the set has them (docs/format.md, section 11.1)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One independently readable piece of one storage.

    Attributes:
        stored_at: offset in the payload, a multiple of 4 KiB.
        at: offset of the first original byte within its storage.
        length: original bytes.
        stored: bytes in the payload; equal to ``length`` for codec 0, fewer for codec 1, none for codec 2.
        storage: number of the storage in the index.
        codec: how the stored bytes become the original ones.
        xxh3: XXH3-64 of the original bytes, for processors.
        wordsum: weighted sum of the original 32-bit words (docs/format.md, section 6), for accelerators.
    """

    stored_at: int
    at: int
    length: int
    stored: int
    storage: int
    codec: int
    xxh3: int
    wordsum: int


def encode(chunks: Iterable[Chunk]) -> bytes:
    """The table's bytes, 48 a chunk."""
    return b"".join(
        _RECORD.pack(c.stored_at, c.at, c.length, c.stored, c.storage, c.codec, 0, c.xxh3, c.wordsum) for c in chunks
    )


def decode(data: bytes) -> tuple[tuple[Chunk, ...], bool]:
    """The chunks of a table and whether every reserved field was zero."""
    clean = True
    found = []
    for stored_at, at, length, stored, storage, codec, reserved, xxh3, wordsum in _RECORD.iter_unpack(data):
        clean = clean and not reserved
        found.append(Chunk(stored_at, at, length, stored, storage, codec, xxh3, wordsum))
    return tuple(found), clean
