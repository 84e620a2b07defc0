"""``thaw compress``: a snapshot losslessly compressed, or back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .output import Force, Json, document, pairs, plain, size
from .progress import progress

EXAMPLES = """
thaw compress llama.thaw llama-small.thaw
thaw compress llama-small.thaw llama.thaw --undo
thaw compress deepseek.thaw deepseek-once.thaw --undo --once
"""


def compress(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A .thaw or .thawkv file; the manifest of a set stands for all ranks.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; the manifest's name of a set.")],
    undo: Annotated[bool, typer.Option("--undo", help="Write it without compression.")] = False,
    once: Annotated[
        bool | None,
        typer.Option(
            "--once/--no-once",
            help="Of a set: what ranks hold alike in one file alone, or in each; by default as it is in IN.",
        ),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu/--no-gpu", help="Compress by the first GPU where there is one, or by processors.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a snapshot losslessly compressed, or back.

    Weights in bfloat16 shrink by a third. It thaws to the same bits, decoded by the GPU on their way, and keeps its
    content and model ids. Chunks that would not shrink stay as they are. Every chunk is verified before it is written.
    While it writes it takes the room of the original bytes. Needs no GPU; without one numba makes it ten times as fast
    as numpy.
    """
    from ..weights.compress import rewrite

    with progress("compress") as advance:
        encoder = 0 if gpu else None
        reports = rewrite(source, target, compress=not undo, once=once, force=force, encoder=encoder, progress=advance)
    total, stored = sum(report.bytes for report in reports), sum(report.file_size for report in reports)
    seconds = max(report.seconds["total"] for report in reports)
    if as_json:
        ranks = [dataclasses.asdict(report) | {"gb_per_s": round(report.gb_per_s, 3)} for report in reports]
        document({"path": str(target), "bytes": total, "file_size": stored, "ranks": ranks})
        return
    rows = [("wrote", f"{plain(report.path)} ({size(report.file_size)})") for report in reports]
    rows += [
        ("ratio", f"{stored / max(total, 1):.3f} of {size(total)}"),
        ("model", reports[0].model or "unknown"),
        ("content", reports[0].content),
        ("took", f"{seconds:.2f} s, {total / 1e9 / max(seconds, 1e-9):.2f} GB/s"),
    ]
    pairs(rows)
