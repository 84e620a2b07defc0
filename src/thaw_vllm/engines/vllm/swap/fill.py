"""Filling a running model's own memory from another snapshot, after ``check`` has passed."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ....errors import MismatchError, ThawError
from ....transport.collector import collection_paused
from ....weights.cache import Lock, lock_of
from ....weights.capture import fillable
from ....weights.reading import RestoreOptions, reading
from ....weights.restore import restore
from ..offering import withdraw
from .check import opened_for, swappable
from .filled import hold, renote

_UNDER_WAY = "it was interrupted"


def fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Put a snapshot's bytes where the model's weights are, at their addresses.

    Args:
        options: ``path``; ``contents``: the content id of each rank's file, as ``check`` has told it; ``verify``: hold
            every chunk against its checksum.

    Returns:
        ``bytes``, ``seconds``, ``route``; or ``broken``: why the weights are now neither the old nor the new ones.

    Raises:
        MismatchError, StorageError, …: before the first byte was written; the weights are as they were.
    """
    start = time.perf_counter()
    model, path = worker.get_model(), options["path"]
    targets, required = fillable(model)
    chosen = RestoreOptions(verify=options["verify"], processes=False)  # starting them takes longer than they gain
    begun = False
    try:
        with (
            collection_paused(),
            opened_for(worker, path) as opened,
            reading(opened.source, targets.values(), chosen) as way,
        ):
            header = opened.snapshot.header
            if header.content != options["contents"][worker.rank]:
                raise MismatchError(f"{path!r} has become another snapshot meanwhile; try again")
            withdraw(model)  # by now nobody copies them: the core has asked all ranks
            lock = _lock(path) if worker.rank == 0 else None
            renote(model, broken=_UNDER_WAY)
            begun = True
            report = restore(opened.source, opened.snapshot, targets, required, chosen, way)
    except BaseException as error:
        if not begun:
            raise
        why = f"{type(error).__name__}: {error}"
        renote(model, broken=why)
        if not isinstance(error, Exception):
            raise
        return {"broken": why}
    hold(model, lock)
    renote(model, broken=None, path=path, content=header.content)
    model._thaw_model_id = header.identity.model
    return {"bytes": report.bytes, "seconds": time.perf_counter() - start, "route": report.route}


def _lock(path: str) -> Lock | None:
    """Keeps a snapshot of the cache there for as long as it is held; without one the swap is as good."""
    with contextlib.suppress(ThawError, OSError):
        lock = lock_of(path)
        if lock is not None and lock.share():
            return lock
    return None


def source_of(worker: Any) -> dict[str, Any]:
    """Where the weights of an engine that may be filled could be had again: ``path`` and ``content``,
    and the id of the ``set`` of ranks' files.

    Raises:
        UnsupportedError: it may not be filled.
        MismatchError, StorageError: the file is gone, or another by now.
    """
    found = swappable(worker)
    return {
        "path": found.path,
        "content": found.content,
        "set": _require_content(worker, found.path, found.content),
    }


def still_there(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whether this rank's file of a snapshot can be opened and is the one of that content id; nothing is changed.

    Args:
        options: ``path``, ``contents``: of each rank.

    Raises:
        MismatchError: it is another.
        FormatError, StorageError: it cannot be read.
    """
    _require_content(worker, options["path"], options["contents"][worker.rank])
    return {}


def _require_content(worker: Any, path: str, content: str | None) -> str | None:
    """The id of the set that this rank's file belongs to.

    Raises:
        MismatchError: it has another content.
    """
    with opened_for(worker, path) as opened:
        if opened.snapshot.header.content != content:
            raise MismatchError(f"{path!r} is not the snapshot any more that this engine was filled from; put it back")
        return opened.snapshot.header.set_id
