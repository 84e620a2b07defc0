"""The two checksums of a chunk, over its original bytes (docs/format.md, section 6)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import xxhash

from ..errors import CorruptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LANES = 1 << 15
"""32-bit words that share one row of weights: 128 KiB of data and 256 KiB of weights stay in a core's cache."""

_MASK = (1 << 64) - 1


def damaged(name: str, label: str, offset: int, length: int) -> CorruptionError:
    """What to raise when a checksum of the source ``name`` does not agree: of what, and where it lies."""
    return CorruptionError(
        f"{name!r} is damaged: the checksum of {label} (bytes {offset} to {offset + length}) does not agree; copy the "
        "file again or freeze again"
    )


def xxh3(data: memoryview) -> int:
    """XXH3-64 (seed 0) of ``data``: the checksum a processor verifies."""
    return xxhash.xxh3_64_intdigest(data)


def weight(position: int) -> int:
    """An odd 64-bit weight: SplitMix64's finaliser (Steele, Lea, Flood 2014) of ``position``, its lowest bit set."""
    z = (position + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return (z ^ z >> 31) | 1


@cache
def lane_weights() -> NDArray[np.uint64]:
    """``weight`` of every lane, shape (LANES,)."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = (np.arange(LANES, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        weights: NDArray[np.uint64] = (z ^ z >> np.uint64(31)) | np.uint64(1)
    return weights


def wordsum(data: memoryview) -> int:
    """The weighted word sum of ``data``: the checksum an accelerator verifies where the bytes arrive.

    With x[i] the little-endian 32-bit words of the data (zero-padded to whole words), i = row * 32768 + lane, and w the
    function ``weight``: the sum over i of x[i] * w(lane) * w(32768 + row), modulo 2**64. Every change of one word shows
    (odd weights are invertible modulo 2**64); changes of several words cancel with probability at most 2**-32.
    """
    import numpy as np

    size = data.nbytes
    whole = size // 4 * 4
    words = np.frombuffer(data, dtype="<u4", count=whole // 4)
    if whole != size:
        tail = np.frombuffer(bytes(data[whole:]).ljust(4, b"\0"), dtype="<u4")
        words = np.concatenate([words, tail])
    weights, total = lane_weights(), 0
    for row, start in enumerate(range(0, len(words), LANES)):
        lanes = words[start : start + LANES].astype(np.uint64)
        total += int(np.dot(lanes, weights[: len(lanes)])) * weight(LANES + row)
    return total & _MASK
