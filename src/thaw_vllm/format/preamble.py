"""The first 256 bytes: magic, version, the sizes of every section and their SHA-256 digests.

All integers are little-endian. The sections follow one another without gaps (docs/format.md, section 2), so a size is
all a reader needs and no offset can point into another section.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from ..errors import CorruptionError, FormatError, VersionError
from .limits import ALIGNMENT, MAX_BYTES, MAX_CHUNKS, MAX_HEADER, MAX_INDEX

MAGIC = b"\x89THAW\r\n\x1a"
VERSION = 1
SIZE = 256
CHUNK_RECORD = 48

_FIELDS = struct.Struct("<8sIIQQQQQQ32s32s32s")
_DIGEST_AT = SIZE - 32


def align(offset: int) -> int:
    """``offset`` rounded up to the alignment of chunks."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Preamble:
    """Sizes in bytes (``chunks``: records) and raw SHA-256 digests of the three sections before the payload."""

    header: int
    index: int
    chunks: int
    payload: int
    header_digest: bytes
    index_digest: bytes
    chunks_digest: bytes

    @property
    def index_at(self) -> int:
        """Absolute offset of the index."""
        return SIZE + self.header

    @property
    def chunks_at(self) -> int:
        """Absolute offset of the chunk table."""
        return self.index_at + self.index

    @property
    def chunks_end(self) -> int:
        """Absolute offset just after the chunk table; zeros follow up to the payload."""
        return self.chunks_at + self.chunks * CHUNK_RECORD

    @property
    def payload_at(self) -> int:
        """Absolute offset of the payload."""
        return align(self.chunks_end)

    @property
    def file_size(self) -> int:
        """Size of the whole file."""
        return self.payload_at + self.payload

    def encode(self) -> bytes:
        """The 256 bytes."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            SIZE,
            self.file_size,
            self.header,
            self.index,
            self.chunks,
            self.payload_at,
            self.payload,
            self.header_digest,
            self.index_digest,
            self.chunks_digest,
        )
        body = fields.ljust(_DIGEST_AT, b"\0")
        return body + hashlib.sha256(body).digest()


def decode(data: bytes, file_size: int) -> Preamble:
    """Read a preamble and hold it against the size of the file.

    Raises:
        FormatError: not a snapshot, or sizes beyond the limits.
        VersionError: written by a later version of the format.
        CorruptionError: truncated, grown, or its checksum does not agree.
    """
    if len(data) < 12:
        raise FormatError(f"not a thaw snapshot: {len(data)} bytes are fewer than its shortest header")
    magic, version, size = struct.unpack_from("<8sII", data.ljust(16, b"\0"))
    if magic != MAGIC:
        raise FormatError(f"not a thaw snapshot: it starts with {data[:8]!r}")
    if version != VERSION:
        raise VersionError(f"format version {version}; this reader knows version {VERSION}. Upgrade thaw to read it")
    if len(data) < SIZE:
        raise CorruptionError(f"truncated: {len(data)} of the preamble's {SIZE} bytes are there")
    body, digest = data[:_DIGEST_AT], data[_DIGEST_AT:SIZE]
    if hashlib.sha256(body).digest() != digest:
        raise CorruptionError("the preamble's checksum does not agree with its bytes")
    _, _, size, said_size, header, index, chunks, payload_at, payload, *digests = _FIELDS.unpack_from(body)
    if header > MAX_HEADER or index > MAX_INDEX or chunks > MAX_CHUNKS or payload > MAX_BYTES:
        raise FormatError(
            f"sections beyond the limits: header {header} of at most {MAX_HEADER} bytes, index {index} of {MAX_INDEX}, "
            f"{chunks} chunks of {MAX_CHUNKS}, payload {payload} of {MAX_BYTES}"
        )
    found = Preamble(header, index, chunks, payload, *digests)
    if any(body[_FIELDS.size :]):
        raise VersionError("the preamble uses bytes that format version 1 reserves; upgrade thaw to read it")
    if (size, said_size, payload_at) != (SIZE, found.file_size, found.payload_at):
        raise FormatError("the preamble's sizes do not add up")
    if file_size != found.file_size:
        state = "truncated" if file_size < found.file_size else "too long"
        raise CorruptionError(f"{state}: {file_size} bytes where the preamble says {found.file_size}")
    return found
