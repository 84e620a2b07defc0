"""Every page of a file of KV blocks under a name that does not depend on the order in which blocks were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..format.kv import PAGES
from ..kv.read import read_table
from ..kv.table import NONE, addresses, root
from ..weights.open import open_rank, open_snapshot
from ..weights.read_storage import filled

Name = tuple[bytes, int, str]
"""The prefix's address, group, region's tensor."""


def pages_by_address(path: Path, rank: int = 0) -> dict[Name, bytes]:
    """Digest of every page of a rank; the file's checksums are verified meanwhile."""
    with open_snapshot(path) as opened:
        table, header = read_table(opened), opened.snapshot.header
    names = addresses(table, root(header.identity, header.kv)) if header.kv is not None else []
    found: dict[Name, bytes] = {}
    with open_rank(path, rank) as opened:
        for tensor in opened.snapshot.index.tensors:
            if not tensor.name.startswith(PAGES) or tensor.storage is None:
                continue
            data, size = memoryview(filled(opened.snapshot, opened.source, tensor.storage)), tensor.shape[1]
            for name, block in zip(names, table.blocks, strict=True):
                for group, slot in enumerate(block.slots):
                    if slot != NONE:
                        page = data[slot * size : (slot + 1) * size]
                        found[name, group, tensor.name] = hashlib.sha256(page).digest()
    return found


def difference(path: Path, other: Path) -> str | None:
    """How the pages of two files differ, of all ranks, in words; None if they hold the same prefixes and bytes."""
    both = [(pages_by_address(path, rank), pages_by_address(other, rank)) for rank in range(_ranks(path))]
    apart = sum(len(mine.keys() ^ theirs.keys()) for mine, theirs in both)
    if apart:
        return f"{apart} pages are in one file only"
    wrong = sum(page != theirs[name] for mine, theirs in both for name, page in mine.items())
    return f"{wrong} of {sum(len(mine) for mine, _ in both)} pages" if wrong else None


def _ranks(path: Path) -> int:
    with open_snapshot(path, with_chunks=False) as opened:
        return opened.snapshot.header.identity.parallel.world
