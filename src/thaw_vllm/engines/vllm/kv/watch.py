"""What the engine core is asked beside thaw's own methods, as far as it concerns weights and freezes under way."""

from __future__ import annotations

from typing import Any

from .. import versions
from .jobs import reap, settle

_HARMLESS = frozenset(
    [
        "add_lora",
        "check_health",
        "execute_dummy_batch",
        "list_loras",
        "pin_lora",
        "profile",
        "remove_lora",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "sleep",
        "wake_up",
    ]
)
"""What workers can be asked through ``collective_rpc`` that leaves their weights alone, beside thaw's own methods."""
_CHANGED = "_thaw_weights_changed"


def install() -> None:
    """Look on from now; a second call does nothing."""
    for name, action in {
        "add_request": lambda core, *_: reap(core),
        "collective_rpc": _note_call,
        "pause_scheduler": lambda core, *_: settle(core),
        "reset_prefix_cache": lambda core, *_: settle(core),
        "sleep": _note_sleep,
    }.items():
        versions.before(name, action)


def weights_changed(core: Any) -> bool:
    """Whether the weights may be others than those that were loaded."""
    return bool(getattr(core, _CHANGED, False))


def weights_known(core: Any) -> None:
    """All weights have been filled from a snapshot since."""
    setattr(core, _CHANGED, False)


def _note_call(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Any other call may change weights (``reload_weights``, ``update_weights``, a function of the user's)."""
    method = args[0] if args else kwargs.get("method")
    if not (isinstance(method, str) and (method in _HARMLESS or method.startswith("thaw_"))):
        setattr(core, _CHANGED, True)


def _note_sleep(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Level 2 drops the weights, and somebody has to bring them back."""
    level = args[0] if args else kwargs.get("level", 1)
    if not isinstance(level, int) or level > 1:
        setattr(core, _CHANGED, True)
    settle(core)
