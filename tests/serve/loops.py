"""Event loops that the tests of a pool run on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def event_loops(kind: str) -> Iterator[None]:
    """``asyncio.run`` uses this kind meanwhile."""
    if kind == "asyncio":
        yield
        return
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
