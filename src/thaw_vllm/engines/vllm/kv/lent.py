"""A file that is open already, lent to the workers of this process."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ....weights.open import Opened

_lent: dict[str, Opened] = {}


@contextlib.contextmanager
def lending(opened: Opened) -> Iterator[str]:
    """Under which name ``borrowed`` finds an open file meanwhile, in this process and in no other."""
    name = secrets.token_hex(16)
    _lent[name] = opened
    try:
        yield name
    finally:
        del _lent[name]


def borrowed(name: str) -> Opened | None:
    """The open file of this name; None in another process than the one that lends it."""
    return _lent.get(name)
