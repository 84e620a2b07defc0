"""An error on its way from a worker to the caller, who would otherwise see only that a worker failed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import ThawError, named


@contextlib.contextmanager
def reported() -> Iterator[str]:
    """Gives a directory for ``noted``; if the block raises anything, a noted error is raised in its place.

    Of several ranks' errors the one that is not about another rank is chosen.
    """
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        try:
            yield folder
        except Exception as failure:
            noted = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            if named(type(failure).__name__) is type(failure):
                raise
            if not noted:
                cause = getattr(failure, "cause", None)
                if isinstance(cause, ThawError):  # of a worker of Ray's, whose error holds it; also on another machine
                    raise cause from failure
                raise
            chosen = min(noted, key=lambda entry: entry["message"].startswith(("rank ", "ranks ")))
            if chosen["error"] == type(failure).__name__:  # it came here by itself
                raise
            kind = named(chosen["error"])
            if kind is None:
                raise ThawError(f"vLLM could not load the model: {chosen['error']}: {chosen['message']}") from failure
            raise kind(chosen["message"]) from failure


@contextlib.contextmanager
def noted(folder: str | None) -> Iterator[None]:
    """Writes an error that passes through to ``folder``, one file a process, and lets it pass."""
    try:
        yield
    except Exception as error:
        if folder is not None:
            with contextlib.suppress(OSError):
                note = json.dumps({"error": type(error).__name__, "message": str(error)})
                (Path(folder) / f"{os.getpid()}.json").write_text(note)
        raise
