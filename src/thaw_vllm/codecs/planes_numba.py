"""The coder of planes as machine code, by numba: the same frames as ``planes`` makes, 10 to 20 times as fast."""

from __future__ import annotations

from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np

from . import planes
from .planes import BITS, BLOCK, LANES, ROW, START, TOTAL, Bytes, Counts, Numbers, Words

_ROWS = BLOCK // ROW


def _compiled(function: Any) -> Any:
    """Without the interpreter's lock; kept in numba's cache, where there is a directory for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's home
        return numba.njit(nogil=True)(function)


@_compiled
def _coded(plane: Any, frequency: Any, begin: Any, ends: Any, states: Any, words: Any) -> None:
    total = 0
    room = np.empty(BLOCK, np.uint16)
    for block in range(len(ends)):
        state = states[block]
        state[:] = START
        free = BLOCK
        first = block * BLOCK
        for at in range(min(BLOCK, len(plane) - first) - ROW, -1, -ROW):
            for k in range(3, -1, -1):
                for lane in range(LANES - 1, -1, -1):
                    symbol = plane[first + at + 4 * lane + k]
                    share = frequency[symbol]
                    own = state[lane]
                    if own >> np.uint32(32 - BITS) >= share:
                        free -= 1
                        room[free] = own & np.uint32(0xFFFF)
                        own >>= np.uint32(16)
                    state[lane] = (own // share << np.uint32(BITS)) + own % share + begin[symbol]
        words[total : total + BLOCK - free] = room[free:]
        total += BLOCK - free
        ends[block] = total


@_compiled
def _decoded(entry: Any, ends: Any, states: Any, words: Any, out: Any) -> bool:
    last, sound = len(words) - 1, True
    for block in range(len(ends)):
        state = states[block].copy()
        at = 0 if block == 0 else np.int64(ends[block - 1])
        first = block * BLOCK
        for row in range(first, min(first + BLOCK, len(out)), ROW):
            for k in range(4):
                for lane in range(LANES):
                    own = state[lane]
                    found = entry[own & np.uint32(TOTAL - 1)]
                    out[row + 4 * lane + k] = found & np.uint32(255)
                    share = (found >> np.uint32(8) & np.uint32(TOTAL - 1)) + np.uint32(1)
                    own = share * (own >> np.uint32(BITS)) + (found >> np.uint32(20))
                    if own < np.uint32(START):
                        own = own << np.uint32(16) | np.uint32(words[min(at, last)])
                        at += 1
                    state[lane] = own
        sound = bool(sound and at == ends[block] and np.all(state == np.uint32(START)))
    return sound


@_compiled
def _counted(plane: Any, counts: Any) -> None:
    for at in range(0, len(plane) - 3, 4):  # four tables, so that none waits for the one before
        counts[0, plane[at]] += 1
        counts[1, plane[at + 1]] += 1
        counts[2, plane[at + 2]] += 1
        counts[3, plane[at + 3]] += 1


@_compiled
def _split2(words: Any, turn: int, low: Any, high: Any) -> None:
    for at in range(len(words)):
        word = np.uint32(words[at])
        word = word << np.uint32(turn) | word >> np.uint32(16 - turn)
        low[at], high[at] = word & np.uint32(255), word >> np.uint32(8) & np.uint32(255)


@_compiled
def _merged2(low: Any, high: Any, turn: int, words: Any) -> None:
    for at in range(len(words)):
        word = np.uint32(low[at]) | np.uint32(high[at]) << np.uint32(8)
        words[at] = word >> np.uint32(turn) | word << np.uint32(16 - turn) & np.uint32(0xFFFF)


def counted(plane: Bytes) -> Counts:
    """See ``planes.counted``."""
    counts = np.zeros((4, 256), np.int64)
    _counted(plane, counts)
    found: Counts = counts.sum(axis=0)
    return found


def split(data: Bytes, width: int, turn: int) -> Bytes:
    """See ``planes.split``."""
    if width != 2:
        return planes.split(data, width, turn)
    words = data[: len(data) // (2 * ROW) * 2 * ROW].view("<u2")
    found = np.empty((2, len(words)), np.uint8)
    _split2(words, turn, *found)
    return found


def merge(parts: Bytes, turn: int, out: Bytes) -> None:
    """See ``planes.merge``."""
    if len(parts) != 2:
        planes.merge(parts, turn, out)
    else:
        _merged2(*parts, turn, out.view("<u2"))


def coded(plane: Bytes, table: Words) -> tuple[Numbers, Numbers, Words]:
    """See ``planes.coded``."""
    blocks = -(-len(plane) // BLOCK)
    frequency = table.astype(np.uint32)
    ends, states = np.empty(blocks, np.uint32), np.empty((blocks, LANES), np.uint32)
    words = np.empty(len(plane), np.uint16)
    _coded(plane, frequency, (np.cumsum(frequency) - frequency).astype(np.uint32), ends, states, words)
    return ends, states, words[: ends[-1]]


def decoded(table: Words, ends: Numbers, states: Numbers, words: Words, out: Bytes) -> bool:
    """See ``planes.decoded``."""
    frequency = table.astype(np.uint32)
    symbol = np.repeat(np.arange(256, dtype=np.uint32), frequency)
    place = np.arange(TOTAL, dtype=np.uint32) - (np.cumsum(frequency) - frequency).astype(np.uint32)[symbol]
    entry = symbol | frequency[symbol] - np.uint32(1) << np.uint32(8) | place << np.uint32(20)
    sound = _decoded(entry, ends, states, words if len(words) else np.zeros(1, np.uint16), out)
    return bool(sound)


def ready() -> None:
    """Compile everything, or load it from the cache; where that cannot be written, do without."""
    try:
        _try_out()
    except OSError:
        own = globals()
        for name in ("_coded", "_decoded", "_counted", "_split2", "_merged2"):
            own[name] = numba.njit(nogil=True)(own[name].py_func)
        _try_out()


def _try_out() -> None:
    data = np.zeros(2 * ROW, np.uint8)
    parts = split(data, 2, 1)
    table = planes.frequencies(counted(parts[1]))
    out = np.empty(ROW, np.uint8)
    assert decoded(table, *coded(parts[1], table), out)
    merge(parts, 1, data)
