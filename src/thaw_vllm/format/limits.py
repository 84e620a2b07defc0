"""Limits a reader enforces before it allocates anything. docs/format.md lists them; raising one is a format change."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

ALIGNMENT = 4 * KIB
"""Every chunk starts at a multiple of this many bytes, so that direct I/O needs no copy."""

HASH_BLOCK = 4 * MIB
"""Storages are hashed in blocks of this size for the content id; a raw chunk is a whole number of them or the last."""

DEFAULT_CHUNK = 16 * MIB
MAX_CHUNK = 64 * MIB

MAX_HEADER = 16 * MIB
MAX_INDEX = 64 * MIB
MAX_CHUNKS = 1 << 22
MAX_TENSORS = 1 << 19
MAX_FILES = 64
MAX_FILE = 64 * MIB
"""Bytes of one carried file: a reader holds it in memory whole."""
MAX_RANK = 64
"""Dimensions of one tensor."""
MAX_NAME = 1024
"""UTF-8 bytes of a tensor's name."""
MAX_RANKS = 4096
"""Files that one set's manifest may name."""
MAX_BYTES = 1 << 56
"""Any length or offset."""
