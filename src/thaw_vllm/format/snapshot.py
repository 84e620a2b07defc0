"""The part of a file before its payload, read whole and held against itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from ..errors import CorruptionError, FormatError, VersionError
from . import chunks as chunk_table
from . import header as header_section
from . import index as index_section
from . import preamble as preamble_section
from .chunks import KEPT, PLANES, RAW, Chunk
from .document import dump, parse
from .header import Header
from .index import Index, Kept
from .limits import ALIGNMENT, HASH_BLOCK, MAX_CHUNK, MAX_CHUNKS, MAX_HEADER, MAX_INDEX
from .preamble import SIZE, Preamble, align

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` returns exactly that range of the file, or raises."""


@dataclass(frozen=True)
class Snapshot:
    """A checked header and index, and the chunk table when it was asked for."""

    preamble: Preamble
    header: Header
    index: Index
    chunks: tuple[Chunk, ...] = ()

    @property
    def elsewhere(self) -> dict[int, Kept]:
        """Storages whose bytes are in other ranks' files, by number."""
        return {kept.storage: kept for kept in self.index.kept}

    @cached_property
    def bytes(self) -> int:
        """Original bytes of all storages."""
        return sum(self.index.storages)

    def paddings(self) -> list[tuple[int, int]]:
        """Absolute (offset, length) of every range that holds nothing and must be zero, in order."""
        gaps = [(self.preamble.chunks_end, self.preamble.payload_at - self.preamble.chunks_end)]
        position = 0
        for chunk in self.chunks:
            gaps.append((self.preamble.payload_at + position, chunk.stored_at - position))
            position = chunk.stored_at + chunk.stored
        gaps.append((self.preamble.payload_at + position, self.preamble.payload - position))
        return [gap for gap in gaps if gap[1]]


def read(source: Read, file_size: int, *, with_chunks: bool = True) -> Snapshot:
    """Read and check everything before the payload.

    Each length is held against the limits and the file's size before it is read, each section against its SHA-256
    before it is parsed, and the sections against each other before anything is returned.

    Args:
        source: reads ranges of the file.
        file_size: its size in bytes.
        with_chunks: False leaves the chunk table unread (what a file is, whatever its size).

    Raises:
        FormatError, VersionError, CorruptionError: docs/format.md says what is allowed.
    """
    preamble = preamble_section.decode(source(0, min(SIZE, file_size)), file_size)
    header_bytes = source(SIZE, preamble.header)
    _agree(header_bytes, preamble.header_digest, "header")
    index_bytes = source(preamble.index_at, preamble.index)
    _agree(index_bytes, preamble.index_digest, "index")
    header = header_section.from_json(parse(header_bytes, "header"))
    index = index_section.from_json(parse(index_bytes, "index"))
    own = header.identity.parallel.rank
    if any(kept.rank >= own for kept in index.kept) or (index.kept and header.ranks is None):
        raise FormatError(f"kept: rank {own} of a set may keep bytes in the files of lower ranks only")
    if not with_chunks:
        return Snapshot(preamble, header, index)
    table = source(preamble.chunks_at, preamble.chunks_end - preamble.chunks_at)
    _agree(table, preamble.chunks_digest, "chunk table")
    chunks, clean = chunk_table.decode(table)
    if not clean:
        raise VersionError("the chunk table uses a field that format version 1 reserves; upgrade thaw to read it")
    check_chunks(chunks, index.storages, preamble.payload, {kept.storage for kept in index.kept})
    return Snapshot(preamble, header, index, chunks)


def check_chunks(
    chunks: tuple[Chunk, ...], storages: tuple[int, ...], payload: int, kept: Collection[int] = ()
) -> None:
    """Every storage is covered exactly once and in order, and no two chunks share a byte of the payload.

    Args:
        kept: numbers of the storages whose bytes are elsewhere.

    Raises:
        FormatError: naming the chunk and the rule.
        VersionError: a codec this reader lacks.
    """
    end = storage = at = 0
    for number, chunk in enumerate(chunks):
        if storage >= len(storages):
            raise FormatError(f"chunk {number}: there is no storage left for it")
        if chunk.storage != storage or chunk.at != at:
            raise FormatError(
                f"chunk {number}: covers storage {chunk.storage} from byte {chunk.at}, expected storage {storage} "
                f"from byte {at}"
            )
        if not 0 < chunk.length <= MAX_CHUNK or at + chunk.length > storages[storage]:
            raise FormatError(f"chunk {number}: {chunk.length} bytes do not fit its storage or the limit {MAX_CHUNK}")
        if chunk.length % HASH_BLOCK and at + chunk.length != storages[storage]:
            raise FormatError(f"chunk {number}: only a storage's last chunk may be no multiple of {HASH_BLOCK} bytes")
        if chunk.codec not in _KINDS:
            raise VersionError(f"chunk {number}: codec {chunk.codec} is not known to this reader; upgrade thaw")
        if (chunk.codec == KEPT) != (storage in kept):
            raise FormatError(f"chunk {number}: codec {chunk.codec}, which is not what kept says of storage {storage}")
        if not _fits(chunk):
            raise FormatError(
                f"chunk {number}: {chunk.stored} stored bytes for {chunk.length} {_KINDS[chunk.codec]} ones"
            )
        if chunk.stored_at != align(end) or chunk.stored_at + chunk.stored > payload:
            raise FormatError(f"chunk {number}: starts at {chunk.stored_at}, not at the next multiple of {ALIGNMENT}")
        end = chunk.stored_at + chunk.stored
        at += chunk.length
        if at == storages[storage]:
            storage, at = storage + 1, 0
    if storage != len(storages):
        raise FormatError(f"storage {storage} is not covered by chunks")
    if align(end) != payload:
        raise FormatError(f"the payload has {payload} bytes, its chunks need {align(end)}")


_KINDS = {RAW: "raw", PLANES: "compressed", KEPT: "kept"}


def _fits(chunk: Chunk) -> bool:
    """Whether its codec may store so many bytes for it."""
    if chunk.codec == PLANES:
        return 0 < chunk.stored < chunk.length
    return chunk.stored == (chunk.length if chunk.codec == RAW else 0)


def front(header: Header, index: Index, chunks: tuple[Chunk, ...], header_size: int = 0) -> tuple[bytes, Preamble]:
    """The bytes before the payload and their preamble, for chunks laid out by ``lay_out``.

    Args:
        header_size: the header is filled up with spaces to this many bytes, so that ids known only after the payload
            was written find their room.

    Raises:
        FormatError: a section is beyond the limits of the format.
    """
    header_bytes = dump(header.to_json()).ljust(header_size)
    index_bytes, table = dump(index.to_json()), chunk_table.encode(chunks)
    if len(header_bytes) > MAX_HEADER or len(index_bytes) > MAX_INDEX or len(chunks) > MAX_CHUNKS:
        raise FormatError(
            f"too large for format version 1: header {len(header_bytes)} of {MAX_HEADER} bytes, index "
            f"{len(index_bytes)} of {MAX_INDEX}, {len(chunks)} chunks of {MAX_CHUNKS}"
        )
    payload = align(chunks[-1].stored_at + chunks[-1].stored) if chunks else 0
    preamble = Preamble(
        len(header_bytes),
        len(index_bytes),
        len(chunks),
        payload,
        hashlib.sha256(header_bytes).digest(),
        hashlib.sha256(index_bytes).digest(),
        hashlib.sha256(table).digest(),
    )
    sections = preamble.encode() + header_bytes + index_bytes + table
    return sections.ljust(preamble.payload_at, b"\0"), preamble


def lay_out(storages: tuple[int, ...], chunk_size: int, kept: Collection[int] = ()) -> tuple[Chunk, ...]:
    """Chunks of ``chunk_size`` bytes (a multiple of HASH_BLOCK) for storages that are raw, or kept elsewhere; checksums
    still zero."""
    found: list[Chunk] = []
    end = 0
    for number, length in enumerate(storages):
        for at in range(0, length, chunk_size):
            size = min(chunk_size, length - at)
            stored, codec = (0, KEPT) if number in kept else (size, RAW)
            found.append(Chunk(align(end), at, size, stored, number, codec, 0, 0))
            end = found[-1].stored_at + stored
    return tuple(found)


def _agree(data: bytes, digest: bytes, what: str) -> None:
    if hashlib.sha256(data).digest() != digest:
        raise CorruptionError(f"the {what}'s checksum does not agree with its bytes")
