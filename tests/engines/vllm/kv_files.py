"""Files of KV blocks that were altered and sealed again."""

import dataclasses
from pathlib import Path

from thaw_vllm.format.snapshot import front
from thaw_vllm.weights.open import open_snapshot


def altered(path, target, change):
    """A copy whose header is ``change(header)``, with checksums that agree."""
    data = Path(path).read_bytes()
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
    header = change(snapshot.header)
    head, _ = front(header, snapshot.index, snapshot.chunks)
    target.write_bytes(head + data[snapshot.preamble.payload_at :])
    return target


def with_identity(**changes):
    """For ``altered``."""
    return lambda header: dataclasses.replace(header, identity=dataclasses.replace(header.identity, **changes))


def with_layout(**changes):
    """For ``altered``."""
    return lambda header: dataclasses.replace(header, kv=dataclasses.replace(header.kv, **changes))


def flipped(path, target, where):
    """A copy with one bit flipped in a tensor's bytes."""
    data = bytearray(Path(path).read_bytes())
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
    storage = next(t.storage for t in snapshot.index.tensors if t.name.startswith(where))
    chunk = next(c for c in snapshot.chunks if c.storage == storage)
    data[snapshot.preamble.payload_at + chunk.stored_at + chunk.length // 2] ^= 4
    target.write_bytes(data)
    return target
