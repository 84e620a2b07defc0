"""``thaw id``: the ids that say which model this is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, document, pairs
from .progress import progress

EXAMPLES = """
thaw id Llama-3-8B/
thaw id weights.thaw
test "$(thaw id A --json | jq .model)" = "$(thaw id B --json | jq .model)"
"""


def id(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory, or a .thaw file.")],
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Believe and remember the id of unchanged files.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Print the model id of a checkpoint or a snapshot.

    It covers the names, dtypes, shapes and bytes of all tensors, however they are split into files: equal ids mean
    equal weights. A checkpoint is read once and its id remembered; a snapshot says its own (thaw verify --content
    proves what it can).
    """
    found: dict[str, Any] = {"path": str(model)}
    if model.is_dir():
        from ..weights.checkpoint import open_checkpoint
        from ..weights.provenance import checkpoint_id

        checkpoint = open_checkpoint(model)
        with progress("id") as advance:
            found["model"] = checkpoint_id(checkpoint, cache=cache, progress=advance)
    else:
        from ..weights.open import open_snapshot

        with open_snapshot(model, with_chunks=False) as opened:
            header = opened.snapshot.header
        found |= {"model": header.identity.model, "content": header.content}
    if as_json:
        document(found)
    else:
        pairs([(name, found[name] or "unknown") for name in ("model", "content") if name in found])
