"""One storage of a snapshot, whole and verified, in memory; without torch."""

from __future__ import annotations

from ..format.snapshot import Snapshot
from ..transport.read import piece_of, read
from ..transport.source import Source


def filled(snapshot: Snapshot, source: Source, storage: int | None) -> bytes:
    """The verified original bytes of one storage: a carried file, a small tensor; nothing where there is none.

    Raises:
        CorruptionError: a checksum does not agree.
    """
    if storage is None:
        return b""
    data = bytearray(snapshot.index.storages[storage])
    view = memoryview(data)
    base = snapshot.preamble.payload_at
    read(
        source,
        [
            piece_of(c, base, f"storage {storage}", view[c.at : c.at + c.length])
            for c in snapshot.chunks
            if c.storage == storage
        ],
        workers=1,
    )
    return bytes(data)
