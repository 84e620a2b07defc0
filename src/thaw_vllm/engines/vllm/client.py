"""Asking an engine core to run one of thaw's methods, from the engine's caller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import BrokenEngineError, UnsupportedError, UsageError
from . import versions
from .answers import raised
from .kv import core as kv_core
from .kv.jobs import PAUSE
from .sessions import core as sessions_core
from .sessions import sampling
from .swap import core as swap_core

if TYPE_CHECKING:
    from vllm import LLM


T = TypeVar("T")

WAKE = "thaw_wake"
"""The one method that a parked engine is asked."""


def install() -> None:
    """Give the engine core thaw's methods, and the front end its part, where this process has them.

    Again does nothing.
    """
    versions.prime_detokenizers(sampling.generated)
    kv_core.install()
    sessions_core.install()
    swap_core.install()


def mark_parked(client: Any, parked: bool) -> None:
    """Note on a ``vllm.LLM`` or ``AsyncLLM`` whether its engine is parked: nobody is to wait for a frozen process."""
    client._thaw_parked = parked


def require_awake(client: Any) -> None:
    """Raises:
    UsageError: its engine is parked.
    """
    if getattr(client, "_thaw_parked", False):
        raise UsageError("the engine is parked; wake it up first")


def call(llm: LLM, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the engine core of a ``vllm.LLM`` answers; its error is raised.

    Raises:
        UsageError: the engine is parked.
        UnsupportedError: it stands for several engine cores.
        BrokenEngineError: one of its processes has died.
    """
    if method != WAKE:
        require_awake(llm)
    install()
    client: Any = llm.llm_engine.engine_core
    inside = getattr(client, "engine_core", None)
    if hasattr(inside, "scheduler"):  # in this process
        return raised(getattr(inside, method)(options))
    if getattr(llm.llm_engine.vllm_config.parallel_config, "data_parallel_size", 1) > 1:
        raise UnsupportedError("data-parallel engines have a cache for each replica; not in this version")
    with alive():
        return raised(versions.call_core_and_wait(client, method, options))


async def ask(client: Any, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the engine core of an asynchronous client answers; of a job, once it has ended."""
    if method != WAKE:
        require_awake(client)
    install()
    size = versions.data_parallel_size(client)
    if size > 1:
        raise UnsupportedError(
            f"this server has {size} data-parallel engines, each with a cache of its own; not in this version: "
            "serve with data_parallel_size=1"
        )
    with alive():
        answer = raised(await versions.call_core(client, method, options))
        while "job" in answer:
            await asyncio.sleep(PAUSE)
            answer = raised(await versions.call_core(client, "thaw_kv_job", {"job": answer["job"]}))
    return answer


async def watched(client: Any, work: Awaitable[T]) -> T:
    """What comes of a call of vLLM's that waits for the engine core of an ``AsyncLLM``.

    Raises:
        BrokenEngineError: that has died meanwhile.
    """
    with alive():
        return await versions.watched(client, work)


@contextlib.contextmanager
def alive() -> Iterator[None]:
    """Raises:
    BrokenEngineError: in place of vLLM's own, whose text does not say what was to be done.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, versions.engine_dead()):
            raise
        raise BrokenEngineError("the engine has died meanwhile (its log says why); start another one") from error
