"""Methods that the plugin attaches to vLLM's workers, called by name through ``collective_rpc``.

Arguments and results are plain lists, dicts, strings and numbers, so they pass vLLM's own serialisation as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import UnsupportedError
from .answers import Answer, answering


def thaw_report(worker: Any) -> dict[str, Any] | None:
    """What this worker's loader froze or thawed last, or None."""
    from . import loader

    return None if loader.last_report is None else dataclasses.asdict(loader.last_report)


def thaw_outcome(worker: Any) -> dict[str, Any] | None:
    """How this worker's model got its weights, where its loader was thaw's."""
    from . import loader

    return None if loader.last_outcome is None else dataclasses.asdict(loader.last_outcome)


def thaw_compiled(worker: Any) -> dict[str, Any] | None:
    """What this worker found of earlier starts' compiled code, and what it compiled itself (``compiled.report``)."""
    from . import compiled

    return compiled.report()


def thaw_model_id(worker: Any) -> str | None:
    """Which weights this worker's loader filled the model with; None where nobody told."""
    found: str | None = getattr(worker.get_model(), "_thaw_model_id", None)
    return found


def thaw_kv_describe(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See kv/pages.py."""
    from .kv import pages

    return pages.describe(worker, options)


def thaw_kv_freeze(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See kv/pages.py."""
    from .kv import pages

    return pages.freeze(worker, options)


def thaw_kv_job(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See kv/pages.py."""
    from .kv import pages

    return pages.job(worker, options)


def thaw_kv_expect(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See kv/pages.py."""
    from .kv import pages

    return pages.expect(worker, options)


def thaw_kv_fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See kv/pages.py."""
    from .kv import pages

    return pages.fill(worker, options)


def thaw_session_write(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See sessions/pages.py."""
    from .sessions import pages

    return pages.write(worker, options)


def thaw_session_fill(worker: Any, options: dict[str, Any]) -> dict[str, Any]:
    """See sessions/pages.py."""
    from .sessions import pages

    return pages.fill(worker, options)


@answering
def thaw_swap_check(worker: Any, path: str, quick: bool = False) -> Answer:
    """See swap/check.py."""
    from .swap.check import check

    return check(worker, path, quick=quick)


@answering
def thaw_fill(worker: Any, options: dict[str, Any]) -> Answer:
    """See swap/fill.py."""
    from .swap.fill import fill

    return fill(worker, options)


@answering
def thaw_source(worker: Any) -> Answer:
    """See swap/fill.py."""
    from .swap.fill import source_of

    return source_of(worker)


@answering
def thaw_wakeable(worker: Any, options: dict[str, Any]) -> Answer:
    """See swap/parking.py."""
    from .swap.parking import wakeable

    return wakeable(worker, options)


@answering
def thaw_pin(worker: Any, path: str) -> Answer:
    """See swap/pins.py."""
    from .swap.pins import hold

    return hold(worker, path)


@answering
def thaw_unpin(worker: Any, path: str) -> Answer:
    """See swap/pins.py."""
    from .swap.pins import release

    return release(worker, path)


@answering
def thaw_offer(worker: Any) -> Answer:
    """See offering.py."""
    from .offering import lend

    return lend(worker.get_model(), worker.vllm_config, worker.rank)


@answering
def thaw_withdraw(worker: Any) -> Answer:
    """See offering.py."""
    from .offering import withdraw

    return withdraw(worker.get_model())


@answering
def thaw_pid(worker: Any) -> Answer:
    """See swap/parking.py."""
    from .swap.parking import process

    return process(worker)


@answering
def thaw_trim(worker: Any) -> Answer:
    """See swap/parking.py."""
    from .swap.parking import trim

    return trim(worker)


@answering
def thaw_freeze(worker: Any, path: str, force: bool = False) -> Answer:
    """Freeze the running model's share of this worker as the raw stage, where post-processing changed nothing.

    Returns:
        The FreezeReport as a dict.
    """
    return _freeze_running(worker, path, force)


def _freeze_running(worker: Any, path: str, force: bool) -> dict[str, Any]:
    from ... import __version__
    from ...format.header import Header
    from ...weights.capture import Captured, capture, module_tensors
    from ...weights.checkpoint import carried_files
    from ...weights.freeze import FreezeOptions
    from ...weights.ranks import freeze_rank, in_step
    from .exchange import world_exchange
    from .identity import config_directory, engine_identity, model_directory
    from .versions import changed_by_configuration, identity_processing

    model, config = worker.get_model(), worker.vllm_config
    why = identity_processing(model) or changed_by_configuration(config)
    if why is not None:
        raise UnsupportedError(
            f"a running engine can be frozen only where post-processing changed nothing: {why}; "
            "freeze while loading instead: thaw freeze --model M --output weights.thaw"
        )
    identity = engine_identity(config, config.model_config, model)
    directory = model_directory(config.model_config)
    exchange, first = world_exchange(), identity.parallel.rank == 0

    def captured() -> Captured:
        files = []
        if directory is not None and first:
            files = carried_files(directory, config_directory(config.model_config))
        return capture(module_tensors(model), files)

    # Neither model id nor source: the weights may have been updated since they were loaded from that directory.
    header = Header(identity=identity, writer=f"thaw {__version__}")
    found = in_step(exchange, identity.parallel.rank, captured)  # a worker that failed lives on, and others wait for it
    report = freeze_rank(path, header, found, FreezeOptions(force=force), exchange, lambda: None)
    return dataclasses.asdict(report)
