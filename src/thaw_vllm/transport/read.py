"""Chunks from a source into memory, many at once, each verified while its bytes are hot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from ..codecs import decode
from ..errors import CorruptionError, FormatError
from ..format.chunks import RAW, Chunk
from .checksum import damaged
from .files import place
from .parallel import run
from .source import Source

STEP = 1 << 20
"""Most bytes read and hashed in turn, small enough that hashing finds them in the core's own cache."""


def step_size(workers: int) -> int:
    """Bytes that each of ``workers`` threads reads and hashes in turn: 512 KiB up to eight threads, STEP from 16.

    Smaller steps stay in a faster cache, but each takes the interpreter lock twice, about 6 µs with two cores and
    more with more threads. Measured with two cores: 256 KiB to 512 KiB restore 4 % faster than 1 MiB, and 512 KiB
    verifies 12 % faster than 256 KiB.
    """
    return min(STEP, max(1 << 19, workers << 16))


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk and where it goes.

    Attributes:
        offset: absolute, in the source.
        stored: bytes there.
        length: original bytes.
        codec: how they become the original ones.
        xxh3: expected XXH3-64 of those.
        label: what a message calls it.
        into: writable contiguous bytes of the destination, when it is host memory; filled directly.
        deliver: otherwise called with the bytes, in a reader thread; they are the reader's and reused afterwards.
            With neither, the piece is only checked; a raw one takes a step of memory then.
    """

    offset: int
    stored: int
    length: int
    codec: int
    xxh3: int
    label: str
    into: memoryview | None = None
    deliver: Callable[[memoryview], None] | None = None


def piece_of(
    chunk: Chunk,
    payload_at: int,
    label: str,
    into: memoryview | None = None,
    deliver: Callable[[memoryview], None] | None = None,
) -> Piece:
    """A chunk of a snapshot whose payload begins at ``payload_at``; see Piece."""
    place = payload_at + chunk.stored_at
    return Piece(place, chunk.stored, chunk.length, chunk.codec, chunk.xxh3, label, into, deliver)


def read(
    source: Source,
    pieces: Iterable[Piece],
    *,
    workers: int,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
    landed: Callable[[int], None] | None = None,
) -> None:
    """Read every piece. Staging memory is one chunk a worker, and none where ``into`` is given; for compressed pieces
    their stored bytes in addition, and what decoding takes: the piece's length with numba, four times that without.

    Args:
        source: where from.
        pieces: what and where to, in order of offset.
        workers: threads.
        verify: hold every piece against its checksum. A piece that goes ``into`` memory is there before it is
            checked; ``deliver`` is called only with checked bytes.
        progress: called with the stored bytes of each finished piece, from any thread.
        landed: called with its offset in the source, from any thread.

    Raises:
        CorruptionError: a piece's bytes do not agree with its checksum, or the source ends early.
        StorageError: the device failed.
    """
    local = threading.local()
    step = step_size(workers)

    def slot(length: int, kind: str = "slot") -> memoryview:
        held: bytearray | None = getattr(local, kind, None)
        if held is None or len(held) < length:
            held = bytearray(length)
            setattr(local, kind, held)
        return memoryview(held)[:length]

    def work(piece: Piece) -> None:
        if piece.into is not None:
            view = piece.into
        elif piece.deliver is not None or not verify or piece.codec != RAW:
            view = slot(piece.length)
        else:
            view = slot(min(piece.length, step))
        if piece.codec != RAW:
            _read_decoded(source, piece, slot(piece.stored, "stored"), view, verify)
        elif verify:
            _read_verified(source, piece, view, step)
        else:
            source.read_into(piece.offset, view)
        if piece.deliver is not None:
            piece.deliver(view)
        if progress is not None:
            progress(piece.stored)
        if landed is not None:
            landed(piece.offset)

    run(pieces, work, workers)


def _read_decoded(source: Source, piece: Piece, stored: memoryview, view: memoryview, verify: bool) -> None:
    source.read_into(piece.offset, stored)
    try:
        decode(piece.codec, stored, view)
    except FormatError as error:
        raise _damaged(source, piece) from error
    if verify and xxhash.xxh3_64_intdigest(view) != piece.xxh3:
        raise _damaged(source, piece)


def _read_verified(source: Source, piece: Piece, view: memoryview, step: int) -> None:
    """``view`` has room for the piece, or for one step that is used again and again."""
    if piece.length <= step:
        source.read_into(piece.offset, view)
        found = xxhash.xxh3_64_intdigest(view)
    else:
        state = xxhash.xxh3_64()
        whole = len(view) == piece.length
        for start in range(0, piece.length, step):
            size = min(step, piece.length - start)
            part = view[start : start + size] if whole else view[:size]
            source.read_into(piece.offset + start, part)
            state.update(part)
        found = state.intdigest()
    if found != piece.xxh3:
        raise _damaged(source, piece)


def _damaged(source: Source, piece: Piece) -> CorruptionError:
    name, offset = place(source, piece.offset)
    return damaged(name, piece.label, offset, piece.stored)
