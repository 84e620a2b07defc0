"""The systems thaw is compared with, one file each; a file is imported in the process that runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    from ..systems import System

RIVALS = {
    "safetensors": "safetensors",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai-model-streamer": "runai",
    "thaw-native": "native",
}
"""Name → the file here with its ``SYSTEM``. A new rival is one file and one line."""
OURS = "thaw"
OUR_VARIANTS = ("thaw-compressed", "thaw-expected", "thaw-compressed-expected")
"""Of a compressed snapshot; in a process that has said that a restore will come; both."""


def system(name: str) -> System:
    """The system of that name, not yet prepared.

    Raises:
        UsageError: there is none.
    """
    if name in (OURS, *OUR_VARIANTS):
        from .. import ours

        return next(kind() for kind in ours.SYSTEMS if kind.name == name)
    if name not in RIVALS:
        raise UsageError(f"there is no system {name!r}; there are {', '.join([OURS, *OUR_VARIANTS, *RIVALS])}")
    found: System = import_module(f"{__name__}.{RIVALS[name]}").SYSTEM
    return found
