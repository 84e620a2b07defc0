"""Entry point of the group ``vllm.general_plugins``: runs in the API server, the engine core and every worker."""

from __future__ import annotations

import logging
import os

_WORKER_METHODS = (
    "thaw_freeze",
    "thaw_report",
    "thaw_outcome",
    "thaw_compiled",
    "thaw_model_id",
    "thaw_swap_check",
    "thaw_fill",
    "thaw_source",
    "thaw_wakeable",
    "thaw_pin",
    "thaw_unpin",
    "thaw_offer",
    "thaw_withdraw",
    "thaw_pid",
    "thaw_trim",
    "thaw_kv_describe",
    "thaw_kv_freeze",
    "thaw_kv_job",
    "thaw_kv_expect",
    "thaw_kv_fill",
    "thaw_session_write",
    "thaw_session_fill",
)


def register() -> None:
    """Teach this process ``load_format="thaw"`` and the methods of thaw's on workers and on the engine core.

    A second call does nothing.

    No environment variable, no default and no security setting of vLLM is touched. Where ``THAW_START_REPORT`` names a
    directory, this process writes there what its start spends time on (``startup``).
    """
    from ...errors import ThawError

    reporting = bool(os.environ.get("THAW_START_REPORT"))
    if reporting:
        from . import startup

        startup.begin()
    try:
        _register()
    except ThawError as error:  # vLLM without thaw must start all the same
        logging.getLogger(__name__).warning("load_format='thaw' is not available: %s", error)
    if reporting:
        startup.plugin_loaded()


def _register() -> None:
    from . import versions

    if not versions.loader_registered("thaw"):
        from vllm.model_executor.model_loader import register_model_loader

        from .loader import ThawModelLoader

        register_model_loader("thaw")(ThawModelLoader)
    base = versions.worker_base()
    from . import worker

    for name in _WORKER_METHODS:
        if not hasattr(base, name):
            setattr(base, name, getattr(worker, name))
    from .client import install

    install()
