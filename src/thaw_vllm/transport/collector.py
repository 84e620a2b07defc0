"""Python's cyclic garbage collector, kept from running in the middle of a restore."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No automatic collection meanwhile, in any thread.

    Reading an index makes some thousand objects, enough to start a full collection. With torch loaded that visits
    hundreds of thousands of objects, 40 ms and more: longer than everything else that a restore does before the first
    byte moves.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
