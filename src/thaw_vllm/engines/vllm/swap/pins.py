"""Snapshots that a worker holds page-locked, for swaps at the speed of the link."""

from __future__ import annotations

import os
from typing import Any

from ....errors import ReplacedError, UnsupportedError
from ....weights.open import Opened, open_rank
from ....weights.pinned import Pinned, pin

_held: dict[str, Pinned] = {}


def hold(worker: Any, path: str) -> dict[str, Any]:
    """Page-lock this rank's snapshot for this process; again does nothing.

    Returns:
        ``bytes`` held and ``seconds`` that took; ``why``, how they are held.

    Raises:
        As ``thaw_vllm.pin``; UnsupportedError: other ranks' files have part of the bytes.
    """
    place = _key(path)
    if place not in _held:
        with open_rank(path, worker.rank, with_chunks=False) as opened:
            own, kept = opened.source.name, opened.snapshot.index.kept
        if kept:
            raise UnsupportedError(
                f"{own!r} has part of its bytes in the files of other ranks, so it cannot be held page-locked; "
                "thaw compress IN OUT --undo --no-once writes a set of which each file has all of its own"
            )
        _held[place] = pin(own, next(worker.get_model().parameters()).device)
    found = _held[place]
    return {"bytes": found.bytes, "seconds": found.seconds, "why": found.why}


def release(worker: Any, path: str) -> dict[str, Any]:
    """Return the memory; of a snapshot that is not held does nothing."""
    found = _held.pop(_key(path), None)
    if found is not None:
        found.close()
    return {"bytes": 0 if found is None else found.bytes}


def release_all() -> None:
    """Return the memory of all."""
    while _held:
        _held.popitem()[1].close()


def pinned(path: str) -> Opened | None:
    """This rank's file of the snapshot as it is held; None where it is not.

    Raises:
        ReplacedError: the path names another file by now. Of a set the first rank finds that, whose file it is.
    """
    found = _held.get(_key(path))
    if found is None:
        return None
    if found.replaced:
        raise ReplacedError(
            f"{path!r} is another file than the one that is held page-locked; unpin it, and pin it again"
        )
    return found.opened


def _key(path: str) -> str:
    return os.path.abspath(path)
