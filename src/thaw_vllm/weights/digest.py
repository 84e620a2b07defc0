"""The two ids: ``content`` of a file and ``model`` of the source tensors (docs/format.md, section 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from blake3 import blake3

from ..format.document import canonical
from ..format.index import Index
from ..format.limits import HASH_BLOCK


def block_digests(data: memoryview) -> list[bytes]:
    """BLAKE3 of each HASH_BLOCK bytes of ``data``, the last block shorter."""
    return [blake3(data[at : at + HASH_BLOCK]).digest() for at in range(0, len(data), HASH_BLOCK)]


def bytes_digest(blocks: Iterable[bytes]) -> str:
    """The digest of a run of bytes from its blocks' digests, in order; so blocks can be hashed in any order."""
    return blake3(b"".join(blocks)).hexdigest()


def content_id(index: Index, digests: Sequence[str]) -> str:
    """The id of what a file holds, whatever its chunks and codecs.

    Args:
        index: the file's index.
        digests: ``bytes_digest`` of each storage's original bytes.
    """
    document = dataclasses.replace(index, kept=()).to_json()
    document["storages"] = [[length, digest] for length, digest in zip(index.storages, digests, strict=True)]
    return blake3(canonical(document)).hexdigest()


def model_id(tensors: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """The id of a model's source tensors.

    Args:
        tensors: checkpoint name, torch dtype name, shape, and ``bytes_digest`` of the elements in row-major order.
    """
    entries = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    return "tensors-blake3:" + blake3(canonical(entries)).hexdigest()
