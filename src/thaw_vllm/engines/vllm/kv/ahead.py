"""What a restore needs beside its file: kept by a worker's process between restores, and made ready for one to come."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ....transport.kept_helpers import ANNOUNCED, KeptHelpers
from ....transport.links import by_driver

if TYPE_CHECKING:
    import torch

    from ....weights.open import Opened

_kept: dict[int, KeptHelpers] = {}
_lent: dict[str, Opened] = {}


def kept(device: torch.device) -> KeptHelpers:
    """This process's for a GPU; they end with it."""
    return _kept.setdefault(device.index or 0, KeptHelpers())


def expect(device: torch.device) -> None:
    """Have helpers come up and page-lock their slots, and the kernel loaded; they wait for a restore ten minutes."""
    if by_driver(device):
        kept(device).start(device.index or 0, ANNOUNCED)


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
