"""Holding a snapshot against its own checksums and, where it holds KV blocks, against the rules of its table."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from ..errors import FormatError, ReplacedError
from ..weights import verify as checksums
from ..weights.open import open_snapshot
from ..weights.verify import VerifyReport
from .read import count_slots, read_table

PAGES = "pages"
"""Page tensors are those of the regions, in the same number and layout in every file that was read."""
TABLE = "table"
"""The table of blocks: parents before children, slots inside the page tensors."""


def verify(path: str | os.PathLike[str], **options: Any) -> VerifyReport:
    """``weights.verify``; of a file of KV blocks also what its table and its pages say.

    Args:
        path: one file, or the manifest of a set.
        options: as there.

    Returns:
        Its report; ``verified`` may hold PAGES and TABLE too.

    Raises:
        FormatError, CorruptionError, ReplacedError: as there, and for a table or pages that are not sound.
    """
    start = time.perf_counter()
    report = checksums.verify(path, **options)
    with open_snapshot(path, with_chunks=False) as opened:
        if opened.snapshot.header.kv is None:
            return report
    verified, shared = [*report.verified, PAGES], set[tuple[object, ...]]()
    for number, name in enumerate(report.files):
        with open_snapshot(name, with_chunks=number == 0) as opened:
            header = opened.snapshot.header
            if number == 0 and header.content != report.content:
                raise ReplacedError(f"{name!r} was replaced while it was being verified; run it again")
            if header.kv is None:
                raise FormatError(f"{name!r} holds weights, {report.path!r} of the same set holds KV blocks")
            shared.add((count_slots(opened), header.kv.block_size, header.kv.cache_dtype, header.kv.groups))
            if header.identity.parallel.rank == 0:
                read_table(opened)
                verified.append(TABLE)
    if len(shared) != 1:
        raise FormatError(f"the files of {report.path!r} differ in the number or layout of their pages; freeze again")
    return dataclasses.replace(report, verified=tuple(verified), seconds=time.perf_counter() - start)
