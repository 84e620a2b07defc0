"""Every page of a file of KV blocks under a name that does not depend on the order in which blocks were written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..format.kv import PAGES
from ..kv.read import read_table
from ..kv.table import NONE, addresses, root
from ..weights.open import open_rank, open_snapshot
from ..weights.read_storage import filled

Name = tuple[int, str, bytes, int]
"""Rank, region's tensor, the prefix's address, group."""


def pages(path: Path) -> dict[Name, bytes]:
    """Digest of every page, of all ranks; the file's checksums are verified meanwhile."""
    with open_snapshot(path) as opened:
        table, header = read_table(opened), opened.snapshot.header
    names = addresses(table, root(header.identity, header.kv)) if header.kv is not None else []
    found: dict[Name, bytes] = {}
    for rank in range(header.identity.parallel.world):
        with open_rank(path, rank) as opened:
            for tensor in opened.snapshot.index.tensors:
                if not tensor.name.startswith(PAGES) or tensor.storage is None:
                    continue
                data, size = memoryview(filled(opened.snapshot, opened.source, tensor.storage)), tensor.shape[1]
                for name, block in zip(names, table.blocks, strict=True):
                    for group, slot in enumerate(block.slots):
                        if slot != NONE:
                            page = data[slot * size : (slot + 1) * size]
                            found[rank, tensor.name, name, group] = hashlib.sha256(page).digest()
    return found


def difference(path: Path, other: Path) -> str | None:
    """How the pages of two files differ, in words; None if there are the same prefixes with the same bytes."""
    mine, theirs = pages(path), pages(other)
    if mine.keys() != theirs.keys():
        return f"{len(mine.keys() ^ theirs.keys())} pages are in one file only"
    wrong = sum(page != theirs[name] for name, page in mine.items())
    return f"{wrong} of {len(mine)} pages" if wrong else None
