"""What ranks hold alike, so that one of them stores it (docs/format.md, section 11.1).

Before it writes, each rank tells of every larger storage its length and a digest of samples. Storages of several ranks
that agree in these are left to the lowest of the ranks; the others only hash theirs while they write the rest. Then
digests of all their bytes are told and compared, and what turns out to differ is written after all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from blake3 import blake3

from ..format.index import Kept
from .capture import Captured

SMALLEST = 64 << 10
"""Bytes of the smallest storage that is left to others: an entry, and a read from another file, cost something too."""

_SAMPLE = 4096
_ALIGNED = 64
"""Samples begin at multiples of it, so at an element."""
_RECORD = struct.Struct("<IQ16s")

Hopes = dict[int, Kept]
"""Of one rank, by number of the storage: where another rank seems to have the same bytes."""


def sampled(captured: Captured, storage: int) -> bytes:
    """What storages with the same bytes have in common: their first bytes, some of the middle, and their last."""
    found = captured.storages[storage]
    last = max(found.length - _SAMPLE, 0) // _ALIGNED * _ALIGNED
    hashed = blake3()
    for at in (0, last // 2 // _ALIGNED * _ALIGNED, last):
        hashed.update(found.read(at, min(_SAMPLE, found.length - at)))
    return hashed.digest()


def marks(captured: Captured, chunk_size: int, mark: Callable[[Captured, int], bytes]) -> bytes:
    """What a rank tells the others of its storages.

    Args:
        chunk_size: part of it: storages that are cut otherwise are not left to one another.
        mark: ``sampled``, or what says as much for less.
    """
    filed = {file.storage for file in captured.index.files}
    records = []
    for number, length in enumerate(captured.index.storages):
        if length >= SMALLEST and number not in filed:
            told = blake3(chunk_size.to_bytes(8, "little") + mark(captured, number)).digest()
            records.append(_RECORD.pack(number, length, told[:16]))
    return b"".join(records)


def hopes(told: Sequence[bytes]) -> list[Hopes]:
    """For each rank what it may leave to a lower one, from what ``marks`` gave of all.

    The lowest rank that has such a storage keeps it, so that none is left to a rank that leaves it to another. Of
    several storages that are marked alike within a rank, the first goes with the first there, and so on.
    """
    keepers: dict[tuple[int, bytes, int], tuple[int, int]] = {}
    found: list[Hopes] = []
    for rank, data in enumerate(told):
        counts: dict[tuple[int, bytes], int] = {}
        own: Hopes = {}
        for number, length, mark in _RECORD.iter_unpack(data):
            nth = counts[length, mark] = counts.get((length, mark), -1) + 1
            keeper, there = keepers.setdefault((length, mark, nth), (rank, number))
            if keeper != rank:
                own[number] = Kept(number, keeper, there)
        found.append(own)
    return found


def compared(everyone: Sequence[Hopes], rank: int) -> list[int]:
    """Storages of a rank whose digests it tells: what it leaves to others, and what others leave to it."""
    left = {kept.there for own in everyone for kept in own.values() if kept.rank == rank}
    return sorted(left | everyone[rank].keys())


def digests(everyone: Sequence[Hopes], rank: int, found: Sequence[str]) -> bytes:
    """What a rank tells of the storages that are ``compared``; ``found``: the digest of each storage's bytes."""
    return b"".join(bytes.fromhex(found[number]) for number in compared(everyone, rank))


def confirmed(everyone: Sequence[Hopes], rank: int, told: Sequence[bytes]) -> Hopes:
    """What of a rank's hopes came true, from what ``digests`` gave of all."""
    known: list[Mapping[int, bytes]] = []
    for other, data in enumerate(told):
        numbers = compared(everyone, other)
        known.append({number: data[32 * at : 32 * at + 32] for at, number in enumerate(numbers)})
    own = everyone[rank].items()
    return {number: kept for number, kept in own if known[rank][number] == known[kept.rank][kept.there]}
