"""``thaw verify``: every byte of a snapshot against its checksums."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .output import Json, document, pairs, plain, size
from .progress import progress

EXAMPLES = """
thaw verify weights.thaw
thaw verify weights.thaw --content
thaw verify prompt.thawkv
"""

_CHECKED = {
    "sections": "header, index and chunk table",
    "chunks": "every chunk's checksum",
    "padding": "padding",
    "content": "content id",
    "set": "the set's files",
    "pages": "form of the pages",
    "table": "table of blocks",
}


def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A .thaw or .thawkv file; the manifest of a set stands for all its ranks."),
    ],
    content: Annotated[
        bool, typer.Option("--content", help="Compute the content id (BLAKE3) as well; slower.")
    ] = False,
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Read every rank's file of a set.")] = True,
    as_json: Json = False,
) -> None:
    """Check every byte of a snapshot.

    The exit code is 3 when it is damaged, and the message says which tensor and where. Of KV blocks the table is held
    against the rules of the format as well. Checksums find accidents.
    That the bytes are the ones you want is proved by the content id, compared with one you got from somewhere else.
    """
    from ..kv.verify import verify as check

    with progress("verify") as advance:
        report = check(file, ranks=ranks, content=content, progress=advance)
    if as_json:
        document(dataclasses.asdict(report) | {"gb_per_s": round(report.gb_per_s, 3)})
        return
    speed = f"{size(report.bytes)} in {report.seconds:.2f} s, {report.gb_per_s:.2f} GB/s"
    rows = [("sound", plain(name)) for name in report.files]
    rows += [
        ("checked", ", ".join(_CHECKED[name] for name in report.verified)),
        ("read", speed),
        ("model", report.model or "unknown"),
        ("content", report.content),
    ]
    pairs(rows)
