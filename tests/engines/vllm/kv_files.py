"""What is in files of KV blocks, for comparing, and files that were altered and sealed again."""

import dataclasses
import hashlib
from pathlib import Path

from thaw_vllm.format.kv import PAGES
from thaw_vllm.format.snapshot import front
from thaw_vllm.kv.read import read_table
from thaw_vllm.kv.table import NONE, addresses, root
from thaw_vllm.weights.open import open_rank, open_snapshot
from thaw_vllm.weights.read_storage import filled


def pages_by_address(path, rank=0):
    """Digest of every page of every block: (address, group, region) to it."""
    with open_snapshot(path) as opened:
        table, header = read_table(opened), opened.snapshot.header
    names = addresses(table, root(header.identity, header.kv))
    found = {}
    with open_rank(path, rank) as opened:
        for tensor in opened.snapshot.index.tensors:
            if tensor.name.startswith(PAGES):
                data, size = filled(opened.snapshot, opened.source, tensor.storage), tensor.shape[1]
                for name, block in zip(names, table.blocks, strict=True):
                    for group, slot in enumerate(block.slots):
                        if slot != NONE:
                            page = data[slot * size : (slot + 1) * size]
                            found[name, group, tensor.name] = hashlib.sha256(page).digest()
    return found


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
