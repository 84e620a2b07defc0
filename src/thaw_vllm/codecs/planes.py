"""Codec 1: elements cut into planes of bytes, of which those that gain are entropy-coded (docs/format.md, section 17).

The exponents of weights in floating point are nearly predictable, signs and mantissas are not. An element turned left
by one bit has its exponent in its highest byte; the bytes of a chunk's elements at one place are a plane. A plane is
coded by range asymmetric numeral systems (rANS; J. Duda, arXiv:1311.2540), 32 coders in turn (F. Giesen,
arXiv:1402.3392), so that a GPU's warp decodes a block, one coder a thread. numpy does it here, for all blocks of a
plane at once; ``planes_numba`` is faster.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import FormatError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Numbers = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]

WIDTHS = (1, 2, 4)
LANES = 32
"""Coders of a block."""
ROW = 4 * LANES
"""Elements that the coders take before any takes another four."""
BLOCK = 128 * ROW
"""Elements of a block; the last one of a plane may have fewer, whole rows."""
BITS = 12
TOTAL = 1 << BITS
"""What the frequencies of a plane's bytes add up to."""
START = 1 << 16
"""The state of a coder before its first symbol, and the least that it has between two."""
HEAD = 32
ALIGN = 16
GAIN = 1 / 32
"""By which share a plane, and a chunk, has to become shorter to be worth coding."""
SAMPLE = 1 << 20
"""Bytes of a chunk by which it is chosen how to cut its elements, and which planes to code; in so many runs."""
_RUNS = 16
_BETTER = 1 / 256
"""By which share of the bytes a later one of ``cuts`` has to gain more: each plane costs time and states."""
_HEAD = struct.Struct("<BBBB4I")


class Tools(Protocol):
    """What passes over every byte: this module's functions, or faster ones of the same names."""

    def counted(self, plane: Bytes) -> Counts:
        """How often each byte occurs."""

    def split(self, data: Bytes, width: int, turn: int) -> Bytes:
        """The planes of whole rows of elements, uint8, ``(width, elements)``; what is beyond them is left out."""

    def merge(self, parts: Bytes, turn: int, out: Bytes) -> None:
        """The other way, into ``out``, of as many bytes."""

    def coded(self, plane: Bytes, table: Words) -> tuple[Numbers, Numbers, Words]:
        """A plane's blocks: where the words of each end, the states they are decoded from, and the words."""

    def decoded(self, table: Words, ends: Numbers, states: Numbers, words: Words, out: Bytes) -> bool:
        """The other way, into ``out``: the plane. Whether every block ended as it has to: damage in what its last words
        say shows nowhere else."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Where a plane lies in a frame, offsets in bytes.

    Attributes:
        at: of a raw plane its bytes; of a coded one 256 frequencies, uint16.
        ends: where each block's words end, uint32, counted in words; 0 for a raw plane, as all that follow.
        states: where each block's coders begin to decode, 32 uint32 a block.
        words: uint16.
        count: of words.
    """

    at: int
    ends: int = 0
    states: int = 0
    words: int = 0
    count: int = 0

    @property
    def coded(self) -> bool:
        """Whether it is entropy-coded."""
        return self.ends > 0


@dataclass(frozen=True, slots=True)
class Frame:
    """How the stored bytes of a chunk are laid out.

    Attributes:
        width: bytes of an element.
        turn: bits by which elements are turned left.
        elements: in planes, a multiple of ROW.
        planes: of the lowest byte first.
        tail: offset of the bytes that are in no plane, which end the frame.
        size: bytes of it.
    """

    width: int
    turn: int
    elements: int
    planes: tuple[Plane, ...]
    tail: int
    size: int

    @property
    def blocks(self) -> int:
        """Of a coded plane."""
        return -(-self.elements // BLOCK)

    def head(self) -> bytes:
        """Its first HEAD bytes."""
        bits = sum(1 << number for number, place in enumerate(self.planes) if place.coded)
        counts = [place.count for place in self.planes] + [0] * (4 - self.width)
        return _HEAD.pack(self.width, self.turn, bits, 0, *counts).ljust(HEAD, b"\0")


def layout(head: bytes, length: int, stored: int) -> Frame:
    """Where everything is, from a frame's first HEAD bytes.

    Args:
        length: original bytes of the chunk.
        stored: bytes of the frame.

    Raises:
        FormatError: what docs/format.md does not allow.
    """
    if len(head) < HEAD:
        raise FormatError(f"a frame has {HEAD} bytes at least, not {len(head)}")
    width, turn, coded, zero, *counts = _HEAD.unpack_from(head)
    if width not in WIDTHS or turn > (width > 1) or zero or any(head[_HEAD.size : HEAD]):
        raise FormatError(f"a frame of elements of {width} bytes, turned by {turn}, is not known")
    if not coded or coded >> width or any(count for k, count in enumerate(counts) if not coded >> k & 1):
        raise FormatError(f"a frame codes planes {coded:#b} of elements of {width} bytes, and has words of others")
    elements = length // (ROW * width) * ROW
    if not elements:
        raise FormatError(f"a frame of {length} bytes has no row of {ROW} elements")
    frame = _laid_out(width, turn, elements, [n if coded >> k & 1 else None for k, n in enumerate(counts)], length)
    if frame.size != stored:
        raise FormatError(f"a frame has {stored} bytes, what it says of itself needs {frame.size}")
    return frame


def _laid_out(width: int, turn: int, elements: int, counts: list[int | None], length: int) -> Frame:
    """Args: counts: of each plane's words; None where it is raw."""
    blocks, at, planes = -(-elements // BLOCK), HEAD, []
    for number, count in enumerate(counts[:width]):
        if count is None:
            planes.append(Plane(at))
            at = aligned(at + elements)
            continue
        if count > elements:
            raise FormatError(f"plane {number} has {count} words for {elements} elements")
        ends = at + 512
        states = aligned(ends + 4 * blocks)
        words = states + 4 * LANES * blocks
        planes.append(Plane(at, ends, states, words, count))
        at = aligned(words + 2 * count)
    return Frame(width, turn, elements, tuple(planes), at, at + length - elements * width)


def aligned(at: int) -> int:
    """The next multiple of ALIGN."""
    return -(-at // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of a chunk's elements.

    Attributes:
        width: bytes of an element.
        turn: bits by which elements are turned left.
        coded: numbers of the planes that are entropy-coded; the others are raw.
    """

    width: int
    turn: int
    coded: tuple[int, ...]


def cuts(length: int, width: int) -> list[tuple[int, int]]:
    """Widths and turns by which elements of so many bytes may be cut, the likeliest last.

    Bytes may be elements of two: blocks of a KV cache are stored as bytes, whatever they are.
    """
    wide = width if width in WIDTHS[1:] else 2
    found = [(1, 0), (wide, 0), (wide, 1)]
    return [(wide, turn) for wide, turn in found if length >= ROW * wide]


def cut(length: int, width: int, counts: Callable[[int, int], Counts]) -> Cut | None:
    """How to cut a chunk, by a sample of it; None where that says that it would not be shorter by a 32nd.

    Args:
        length: bytes of the chunk.
        width: bytes of its elements: 2 or 4; any other says that it is not known.
        counts: of a width and a turn (see ``cuts``), how often each byte occurs in the sample's planes,
            ``(width, 256)``.
    """
    best: tuple[float, Cut] | None = None
    for wide, turn in cuts(length, width):
        found = counts(wide, turn)
        bits, raw = _bits(found), 8 * found.sum(axis=1)
        worth = bits < (1 - GAIN) * raw
        share = np.where(worth, bits, raw).sum() / raw.sum()
        if best is None or share < best[0] - _BETTER:
            best = share, Cut(wide, turn, tuple(number for number, gains in enumerate(worth) if gains))
    return None if best is None or best[0] > 1 - GAIN else best[1]


def framed(how: Cut, length: int, words: Mapping[int, int]) -> Frame | None:
    """The frame of a chunk of ``length`` bytes, by the words of each coded plane; None where it gains too little."""
    elements = length // (ROW * how.width) * ROW
    frame = _laid_out(how.width, how.turn, elements, [words.get(number) for number in range(how.width)], length)
    return None if frame.size > length * (1 - GAIN) else frame


def encode(data: memoryview | Bytes, width: int, tools: Tools | None = None) -> bytes | None:
    """A frame that holds ``data``; None where it would not be shorter by a 32nd, or a sample of it says so.

    Args:
        data: bytes of a chunk.
        width: bytes of its elements: 2 or 4; any other says that it is not known. Whether elements are turned, and
            which planes are coded, is measured.
        tools: to do it with; None for this module's own.
    """
    pass_ = tools or _OWN
    raw = np.frombuffer(data, np.uint8)
    sample = _sample(raw)
    how = cut(len(raw), width, lambda w, turn: np.stack([pass_.counted(part) for part in pass_.split(sample, w, turn)]))
    if how is None:
        return None
    planes = pass_.split(raw, how.width, how.turn)
    parts: dict[int, tuple[npt.NDArray[Any], ...]] = {}
    for number in how.coded:
        table = frequencies(pass_.counted(planes[number]))
        parts[number] = table, *pass_.coded(planes[number], table)
    frame = framed(how, len(raw), {number: len(part[3]) for number, part in parts.items()})
    if frame is None:
        return None
    out = np.zeros(frame.size, np.uint8)
    out[:HEAD] = np.frombuffer(frame.head(), np.uint8)
    for number, place in enumerate(frame.planes):
        if not place.coded:
            out[place.at : place.at + frame.elements] = planes[number]
            continue
        for at, array in zip((place.at, place.ends, place.states, place.words), parts[number], strict=True):
            out[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
    out[frame.tail :] = raw[frame.elements * frame.width :]
    return out.tobytes()


def decode(stored: memoryview, out: memoryview, tools: Tools | None = None) -> None:
    """Undo ``encode``, into as many bytes as there were.

    Args:
        tools: to do it with; None for this module's own.

    Raises:
        FormatError: what docs/format.md does not allow. Checksums tell whether the bytes are the original ones.
    """
    tools = tools or _OWN
    frame = layout(bytes(stored[:HEAD]), len(out), len(stored))
    data, into = np.frombuffer(stored, np.uint8), np.frombuffer(out, np.uint8)
    planes = np.empty((frame.width, frame.elements), np.uint8)
    for number, place in enumerate(frame.planes):
        if place.coded:
            if not tools.decoded(*checked(data, frame, place), planes[number]):
                raise FormatError(f"the words of plane {number} do not end where they have to")
        else:
            planes[number] = data[place.at : place.at + frame.elements]
    for low, high in gaps(frame):
        if data[low:high].any():
            raise FormatError(f"bytes {low} to {high} of a frame lie between its parts and must be zero")
    whole = frame.elements * frame.width
    tools.merge(planes, frame.turn, into[:whole])
    into[whole:] = data[frame.tail :]


def gaps(frame: Frame) -> list[tuple[int, int]]:
    """Runs of bytes between the parts of a frame, by their offsets."""
    found = []
    for place, next_ in zip(frame.planes, [*(p.at for p in frame.planes[1:]), frame.tail], strict=True):
        if place.coded:
            found += [(place.ends + 4 * frame.blocks, place.states), (place.words + 2 * place.count, next_)]
        else:
            found.append((place.at + frame.elements, next_))
    return [(low, high) for low, high in found if low < high]


def checked(data: Bytes, frame: Frame, place: Plane) -> tuple[Words, Numbers, Numbers, Words]:
    """Frequencies, ends, states and words of a coded plane.

    Raises:
        FormatError: frequencies that do not add up, or blocks' words that are not one after another.
    """

    def part(at: int, count: int, kind: str) -> Any:
        size = count * np.dtype(kind).itemsize
        return data[at : at + size].view(kind)

    table = part(place.at, 256, "<u2")
    ends = part(place.ends, frame.blocks, "<u4")
    if int(table.sum(dtype=np.int64)) != TOTAL:
        raise FormatError(f"a plane's frequencies add up to {int(table.sum(dtype=np.int64))}, not {TOTAL}")
    if int(ends[-1]) != place.count or (np.diff(ends.astype(np.int64)) < 0).any():
        raise FormatError("a plane's blocks do not divide its words")
    states = part(place.states, LANES * frame.blocks, "<u4").reshape(-1, LANES)
    return table, ends, states, part(place.words, place.count, "<u2")


def runs(length: int) -> list[tuple[int, int]]:
    """The sample of a chunk, as offsets and lengths: all of a short one, runs from all over a long one."""
    if length <= SAMPLE:
        return [(0, length)]
    run, step = SAMPLE // _RUNS, ROW * WIDTHS[-1]
    return [((length - run) * n // (_RUNS - 1) // step * step, run) for n in range(_RUNS)]


def _sample(raw: Bytes) -> Bytes:
    return np.concatenate([raw[at : at + run] for at, run in runs(len(raw))])


def _bits(counts: Counts) -> npt.NDArray[np.float64]:
    """Of each row: bits that an ideal coder needs for so many occurrences of each byte."""
    total = counts.sum(axis=1, keepdims=True)
    share = np.log2(np.maximum(total, 1) / np.maximum(counts, 1))
    found: npt.NDArray[np.float64] = (counts * share).sum(axis=1)
    return found


def counted(plane: Bytes) -> Counts:
    """See Tools."""
    return np.bincount(plane, minlength=256)


def split(data: Bytes, width: int, turn: int) -> Bytes:
    """See Tools."""
    elements = len(data) // (ROW * width) * ROW
    words = data[: elements * width].view(f"<u{width}")
    if turn:
        words = words << 1 | words >> (8 * width - 1)
    return np.ascontiguousarray(words.view(np.uint8).reshape(elements, width).T)


def merge(parts: Bytes, turn: int, out: Bytes) -> None:
    """See Tools."""
    width = len(parts)
    words = np.ascontiguousarray(parts.T).reshape(-1).view(f"<u{width}")
    if turn:
        words = words >> 1 | words << (8 * width - 1)
    out[:] = words.view(np.uint8)


def frequencies(counts: Counts) -> Words:
    """Of each byte, for as many occurrences: TOTAL in all, and none of a byte that occurs is 0."""
    found = np.maximum((counts * (TOTAL / counts.sum())).astype(np.int64), counts > 0)
    while left := int(TOTAL - found.sum()):
        step = 1 if left > 0 else -1
        may = found > (1 if step < 0 else 0)
        change = np.where(may, counts * np.log2(np.where(may, found + step, 1) / np.where(may, found, 1)), -np.inf)
        best = np.argsort(-change, kind="stable")[: min(abs(left), int(may.sum()), 8)]  # those it costs least
        found[best] += step
    shares: Words = found.astype(np.uint16)
    return shares


def coded(plane: Bytes, table: npt.NDArray[np.uint16]) -> tuple[Numbers, Numbers, Words]:
    """See Tools."""
    blocks = -(-len(plane) // BLOCK)
    steps = np.zeros((blocks, BLOCK // ROW, LANES, 4), np.uint8)
    steps.reshape(-1)[: len(plane)] = plane
    frequency = table.astype(np.uint32)
    begin = (np.cumsum(frequency) - frequency).astype(np.uint32)
    state = np.full((blocks, LANES), START, np.uint32)
    words = np.zeros((blocks, BLOCK // ROW, 4, LANES), np.uint16)
    taken = np.zeros(words.shape, bool)
    for row in range(BLOCK // ROW - 1, -1, -1):
        there = blocks if row < (len(plane) - (blocks - 1) * BLOCK) // ROW else blocks - 1
        own = state[:there]
        for k in (3, 2, 1, 0):
            symbols = steps[:there, row, :, k]
            share = frequency[symbols]
            full = own >> (32 - BITS) >= share
            words[:there, row, k] = own & 0xFFFF
            taken[:there, row, k] = full
            own = np.where(full, own >> 16, own)
            own = (own // share << BITS) + own % share + begin[symbols]
        state[:there] = own
    ends = taken.reshape(blocks, -1).sum(axis=1).cumsum().astype(np.uint32)
    return ends, state, words[taken]


def decoded(table: Words, ends: Numbers, states: Numbers, words: Words, out: Bytes) -> bool:
    """See Tools."""
    blocks = len(ends)
    frequency = table.astype(np.uint32)
    symbol = np.repeat(np.arange(256, dtype=np.uint8), frequency)
    share = frequency[symbol]
    place = np.arange(TOTAL, dtype=np.uint32) - (np.cumsum(frequency, dtype=np.uint32) - frequency)[symbol]
    steps = np.empty((blocks, BLOCK // ROW, LANES, 4), np.uint8)
    padded = np.append(words, np.uint16(0))
    at = np.concatenate([np.zeros(1, np.int64), ends[:-1].astype(np.int64)])[:, None]
    state = states.astype(np.uint32)
    for row in range(BLOCK // ROW):
        there = blocks if row < (len(out) - (blocks - 1) * BLOCK) // ROW else blocks - 1
        own, next_ = state[:there], at[:there]
        for k in range(4):
            slot = own & (TOTAL - 1)
            steps[:there, row, :, k] = symbol[slot]
            own = share[slot] * (own >> BITS) + place[slot]
            low = own < START
            taken = np.cumsum(low, axis=1)
            word = padded[np.minimum(next_ + taken - 1, len(words))]
            own = np.where(low, own << 16 | word, own)
            next_ = next_ + taken[:, -1:]
        state[:there], at[:there] = own, next_
    out[:] = steps.reshape(-1)[: len(out)]
    return bool((state == START).all() and (at[:, 0] == ends).all())


_OWN: Any = sys.modules[__name__]
