"""How tensor-parallel ranks divide a parameter among them, for any number of ranks; numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Part:
    """One of the matrices that are stacked in a parameter, as that of all ranks together.

    Attributes:
        size: elements in the dimension that is divided.
        units: into how many pieces it can be divided at most, such as heads; with more ranks, several hold the same
            piece. None where every rank has its own.
    """

    size: int
    units: int | None = None

    def span(self, ranks: int, rank: int) -> tuple[int, int]:
        """Where the rank's piece begins, and its length.

        Raises:
            UnsupportedError: it cannot be divided so.
        """
        pieces = ranks if self.units is None else min(ranks, self.units)
        if ranks % pieces or (self.units or self.size) % pieces or self.size % pieces:
            raise UnsupportedError(f"{self.size} elements cannot be divided among {ranks} ranks")
        length = self.size // pieces
        return rank // (ranks // pieces) * length, length


@dataclass(frozen=True)
class Division:
    """Of one parameter.

    Attributes:
        dim: the dimension that is divided; None where every rank holds all of it.
        parts: what is stacked there, in order; a rank's tensor has its pieces of each in the same order.
        padded: the sum of all ranks' elements in that dimension, where those at the end stand for nothing and are zero.
    """

    dim: int | None = None
    parts: tuple[Part, ...] = ()
    padded: int | None = None


WHOLE = Division()


@dataclass(frozen=True)
class Slice:
    """Elements of the divided dimension that a rank of the new engine takes from a rank of the old one.

    Attributes:
        rank: the old one's.
        start: where they begin in its tensor.
        at: where they go in the new one's.
        length: how many.
    """

    rank: int
    start: int
    at: int
    length: int


def slices(division: Division, old: int, new: int, rank: int) -> tuple[list[Slice], int]:
    """What a rank of ``new`` takes from which of ``old`` ranks, and how many elements of zeros follow.

    Of several that hold the same the first is chosen which does not lie before the rank's own share of them, so that
    ranks read different files where they can.

    Args:
        division: of a parameter that is divided (``dim`` is not None).

    Raises:
        UnsupportedError: it cannot be divided among so many.
    """
    found: list[Slice] = []
    theirs = [_local(division, old, other) for other in range(old)]
    at = 0
    preferred = rank * old // new
    order = sorted(range(old), key=lambda other: abs(other - preferred))
    for part, (begin, length) in enumerate(_spans(division, new, rank)):
        end = begin + length
        while begin < end:
            other, (low, high, local) = _holding(theirs, order, part, begin)
            take = min(end, high) - begin
            found.append(Slice(other, local + begin - low, at, take))
            begin, at = begin + take, at + take
    zeros = 0 if division.padded is None else _share(division.padded, new) - at
    return found, zeros


def local_size(division: Division, ranks: int, rank: int) -> int:
    """Elements of a rank's tensor in the divided dimension.

    Raises:
        UnsupportedError: it cannot be divided among so many.
    """
    if division.padded is not None:
        return _share(division.padded, ranks)
    return sum(length for _, length in _spans(division, ranks, rank))


def _spans(division: Division, ranks: int, rank: int) -> list[tuple[int, int]]:
    """Of each part, where the rank's piece begins, and its length."""
    if division.padded is None:
        return [part.span(ranks, rank) for part in division.parts]
    (part,), share = division.parts, _share(division.padded, ranks)
    begin, end = (min(edge * share, part.size) for edge in (rank, rank + 1))
    return [(begin, end - begin)]


def _share(padded: int, ranks: int) -> int:
    if padded % ranks:
        raise UnsupportedError(f"{padded} rows cannot be divided among {ranks} ranks")
    return padded // ranks


def _local(division: Division, ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """Of each part, where the rank's piece begins and ends, and where it lies in the rank's tensor."""
    found, at = [], 0
    for begin, length in _spans(division, ranks, rank):
        found.append((begin, begin + length, at))
        at += length
    return found


def _holding(
    theirs: Sequence[Sequence[tuple[int, int, int]]], order: Sequence[int], part: int, element: int
) -> tuple[int, tuple[int, int, int]]:
    return next(
        (other, theirs[other][part]) for other in order if theirs[other][part][0] <= element < theirs[other][part][1]
    )
