"""Freeze a running LLM; thaw it anywhere, bit for bit.

The public names below are resolved when first used, so that importing this package loads neither torch nor an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ForkPool": "engines.vllm.sessions.pool",
    "ThawModelLoader": "engines.vllm.loader",
    "check_swap": "engines.vllm.swap.api",
    "checkpoint": "engines.vllm.sessions.api",
    "checkpoint_async": "engines.vllm.sessions.api",
    "checkout": "engines.vllm.sessions.api",
    "checkout_async": "engines.vllm.sessions.api",
    "expect_kv_restore": "engines.vllm.kv.api",
    "expect_kv_restore_async": "engines.vllm.kv.api",
    "expect_restore": "weights.ahead",
    "fork": "engines.vllm.sessions.forking",
    "fork_async": "engines.vllm.sessions.forking",
    "freeze_cache": "engines.transformers.cache",
    "freeze_kv_cache": "engines.vllm.kv.api",
    "freeze_kv_cache_async": "engines.vllm.kv.api",
    "freeze_kv_cache_tp": "engines.vllm.kv.api",
    "freeze_model": "weights.module",
    "freeze_model_pipelined": "weights.module",
    "freeze_model_tp": "engines.vllm.api",
    "load": "engines.vllm.api",
    "pack_caches": "engines.vllm.packing",
    "park": "engines.vllm.swap.parked",
    "park_async": "engines.vllm.swap.parked",
    "pin": "weights.pinned",
    "pin_snapshot": "engines.vllm.swap.api",
    "restore_cache": "engines.transformers.cache",
    "restore_kv_cache": "engines.vllm.kv.api",
    "restore_kv_cache_async": "engines.vllm.kv.api",
    "restore_kv_cache_tp": "engines.vllm.kv.api",
    "restore_model": "weights.module",
    "restore_model_broadcast": "weights.fan_out",
    "restore_model_from_ram": "weights.module",
    "restore_model_pipelined": "weights.module",
    "resume": "engines.vllm.sessions.api",
    "swap_weights": "engines.vllm.swap.api",
    "swap_weights_async": "engines.vllm.swap.api",
    "unpin_snapshot": "engines.vllm.swap.api",
    "wake": "engines.vllm.swap.parked",
    "wake_async": "engines.vllm.swap.parked",
}

__all__ = [
    "ForkPool",
    "ThawModelLoader",
    "__version__",
    "check_swap",
    "checkout",
    "checkout_async",
    "checkpoint",
    "checkpoint_async",
    "expect_kv_restore",
    "expect_kv_restore_async",
    "expect_restore",
    "fork",
    "fork_async",
    "freeze_cache",
    "freeze_kv_cache",
    "freeze_kv_cache_async",
    "freeze_kv_cache_tp",
    "freeze_model",
    "freeze_model_pipelined",
    "freeze_model_tp",
    "load",
    "pack_caches",
    "park",
    "park_async",
    "pin",
    "pin_snapshot",
    "restore_cache",
    "restore_kv_cache",
    "restore_kv_cache_async",
    "restore_kv_cache_tp",
    "restore_model",
    "restore_model_broadcast",
    "restore_model_from_ram",
    "restore_model_pipelined",
    "resume",
    "swap_weights",
    "swap_weights_async",
    "unpin_snapshot",
    "wake",
    "wake_async",
]

if TYPE_CHECKING:
    from .engines.transformers.cache import freeze_cache, restore_cache
    from .engines.vllm.api import freeze_model_tp, load
    from .engines.vllm.kv.api import (
        expect_kv_restore,
        expect_kv_restore_async,
        freeze_kv_cache,
        freeze_kv_cache_async,
        freeze_kv_cache_tp,
        restore_kv_cache,
        restore_kv_cache_async,
        restore_kv_cache_tp,
    )
    from .engines.vllm.loader import ThawModelLoader
    from .engines.vllm.packing import pack_caches
    from .engines.vllm.sessions.api import checkout, checkout_async, checkpoint, checkpoint_async, resume
    from .engines.vllm.sessions.forking import fork, fork_async
    from .engines.vllm.sessions.pool import ForkPool
    from .engines.vllm.swap.api import (
        check_swap,
        pin_snapshot,
        swap_weights,
        swap_weights_async,
        unpin_snapshot,
    )
    from .engines.vllm.swap.parked import park, park_async, wake, wake_async
    from .weights.ahead import expect_restore
    from .weights.fan_out import restore_model_broadcast
    from .weights.module import (
        freeze_model,
        freeze_model_pipelined,
        restore_model,
        restore_model_from_ram,
        restore_model_pipelined,
    )
    from .weights.pinned import pin


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
