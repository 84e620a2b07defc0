"""Which bytes are read together: ranges of a source cut and joined into steps of one staging slot. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLOCK = 4096
"""Direct reads begin and end at multiples of this: the largest logical block that disks have."""


class Cut(NamedTuple):
    """A run of one range inside a step.

    Attributes:
        at: offset of its first byte in the step.
        range: which of the ranges it belongs to, by number.
        begin: offset of its first byte in that range.
        length: bytes.
    """

    at: int
    range: int
    begin: int
    length: int


class Step(NamedTuple):
    """One read: ``length`` bytes of the source from ``offset``, and what is wanted of them, in order."""

    offset: int
    length: int
    cuts: tuple[Cut, ...]


def steps(ranges: Iterable[tuple[int, int] | None], slot: int, join: int = BLOCK) -> Iterator[Step | None]:
    """Cover ranges with reads of at most ``slot`` bytes.

    Small neighbours share a read, long ranges are cut. A range is cut where the next read then begins at a multiple of
    BLOCK, if there is such a place in it.

    Args:
        ranges: offset and length of each, in order of offset, none overlapping another; empty ones are passed over. At
            a None, which counts for none, what was joined so far is given at once, and the None after it.
        slot: bytes, at least 2 * BLOCK.
        join: neighbours with at most this many unwanted bytes between them are read together.

    Raises:
        ValueError: a slot too small, or ranges out of order.
    """
    if slot < 2 * BLOCK:
        raise ValueError(f"a slot must have at least {2 * BLOCK} bytes, not {slot}")
    cuts: list[Cut] = []
    start = end = 0

    def made() -> Step:
        found = Step(start, end - start, tuple(cuts))
        cuts.clear()
        return found

    number = -1
    for item in ranges:
        if item is None:
            if cuts:
                yield made()
            yield None
            continue
        number += 1
        offset, length = item
        if offset < end and length:
            raise ValueError(f"range {number} begins at {offset}, the one before it ends at {end}")
        begin = 0
        while begin < length:
            at = offset + begin
            if cuts and (at - end > join or at - start >= slot):
                yield made()
            if not cuts:
                start = at
            take = min(length - begin, slot - (at - start))
            if take < length - begin:
                aligned = (at + take) // BLOCK * BLOCK - at
                if aligned <= 0 and cuts:  # too little room is left to end on a block
                    yield made()
                    continue
                take = aligned if aligned > 0 else take
            cuts.append(Cut(at - start, number, begin, take))
            begin, end = begin + take, at + take
            if begin < length:
                yield made()
    if cuts:
        yield made()
