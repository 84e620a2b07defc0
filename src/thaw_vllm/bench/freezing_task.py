"""The child's side of freezing: one system writes the model once, and what it wrote is read back and compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import llama
from .child import Steps
from .device import opened, settle, timed
from .digest import digests, first_difference
from .rivals import OUR_VARIANTS, OURS, system


def freeze(request: dict[str, Any]) -> Steps:
    """``system``, ``device``, ``shape``, ``path`` (removed in the end)."""
    device, writer = opened(request["device"]), system(request["system"])
    writer.prepare(device)
    yield
    shape, path = llama.Shape(**request["shape"]), Path(request["path"])
    model = llama.random(shape, device)
    wanted = digests(model.tensors)
    settle(device)
    yield
    try:
        seconds, (said, file_size) = timed(lambda: _write(writer, model, path), device)
        yield
        if request["system"] in (OURS, *OUR_VARIANTS):
            from ..weights.verify import verify

            verify(path)
        llama.poison(model.tensors)
        found = writer.restore([path], device, model if writer.in_place else None, True)
        different = first_difference(digests(found.tensors), wanted)
    finally:
        path.unlink(missing_ok=True)
    return {"seconds": seconds, "equal": different is None, "different": different, "file_size": file_size, **said}


def _write(writer: Any, model: llama.Model, path: Path) -> tuple[dict[str, Any], int]:
    """With an fsync for those that make none: a file that is in the page cache only has not been written."""
    said = dict(writer.freeze(model, path))
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        return said, os.fstat(file).st_size
    finally:
        os.close(file)


TASKS = {"freeze": freeze}
