"""``thaw convert``: safetensors checkpoints to snapshots and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .output import Force, Json, document, pairs, plain, size
from .progress import progress

EXAMPLES = """
thaw convert Llama-3-8B/ llama.thaw
thaw convert llama.thaw Llama-3-8B-again/
"""


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A directory with *.safetensors, or a .thaw file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .thaw file, or the directory, to write.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert safetensors to a snapshot, or back.

    Needs no GPU and no engine. What IN is decides the direction. Every tensor keeps its name and its bits, and the
    model id stays the same. The snapshot is of stage checkpoint, which restore_model() thaws; for vLLM use thaw
    freeze.
    """
    # typer's own arguments are read; torch is needed only now.
    from ..weights import convert as conversion

    with progress("convert") as advance:
        if source.is_dir():
            written = conversion.from_checkpoint(source, target, force=force, progress=advance)
            rows = [
                ("wrote", f"{plain(written.path)} ({size(written.file_size)}, {written.tensors} tensors)"),
                ("model", written.model or "unknown"),
                ("content", written.content),
                ("took", f"{written.seconds['total']:.2f} s, {written.gb_per_s:.2f} GB/s"),
            ]
            answer = dataclasses.asdict(written) | {"direction": "to-snapshot", "gb_per_s": round(written.gb_per_s, 3)}
        else:
            made = conversion.to_checkpoint(source, target, force=force, progress=advance)
            listed = [*made.files, *made.carried]
            rows = [("wrote", f"{plain(made.directory)} ({size(made.bytes)}, {made.tensors} tensors)")]
            rows += [("", name) for name in listed[:12]]
            rows += [("", f"and {len(listed) - 12} more")] if len(listed) > 12 else []
            if made.repeated:
                rows.append(("note", f"safetensors has no ties; written on its own: {_listed(made.repeated)}"))
            rows.append(("model", made.model or "unknown"))
            rows.append(("took", f"{made.seconds:.2f} s, {made.gb_per_s:.2f} GB/s"))
            answer = dataclasses.asdict(made) | {"direction": "to-checkpoint", "gb_per_s": round(made.gb_per_s, 3)}
    if as_json:
        document(answer)
    else:
        pairs(rows)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(plain(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
