"""Python calls: other weights into a running engine, and an engine that gives its GPU back and takes it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import BrokenEngineError, ThawError, UsageError
from .. import versions
from ..client import ask, call, watched
from ..kv.core import path_of

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM

DEADLINE = 30.0
"""Seconds in which requests may end before a swap ends them."""


@dataclass(frozen=True)
class Swappable:
    """What a swap would fill.

    Attributes:
        bytes: of weights.
        tensors: names, ties included.
        model: the snapshot's model id; None where it says none.
    """

    bytes: int
    tensors: int
    model: str | None


@dataclass(frozen=True)
class SwapReport:
    """What was filled.

    Attributes:
        bytes: of weights.
        model: the model id of what the engine holds now; None where the snapshot says none.
        aborted: requests that were not finished at the deadline, or came meanwhile, and were ended (finish reason
            ``abort``); they can be sent again.
        route: how the bytes moved.
        seconds: by phase (``check``, ``drain``, ``fill``, ``canary``), and ``total`` of these; waiting for requests is
            not in it.
    """

    bytes: int
    model: str | None
    aborted: int
    route: str
    seconds: dict[str, float] = field(default_factory=dict)


def check_swap(llm: LLM, snapshot: str | os.PathLike[str]) -> Swappable:
    """Whether the weights of ``snapshot`` could take the place of a running engine's, in the same memory.

    An engine qualifies if it was started with ``load_format="thaw"`` (from a snapshot, or freezing one), its weights
    are as loading left them (unquantised dense models on CUDA; no LoRA, no draft model), and no tensor hangs
    on the model but parameters, buffers, the KV cache and what CUDA graphs write. A snapshot qualifies if its
    configuration is the engine's, it fills the same tensors in the same shapes with the same plain values, and carries
    the same tokenizer, chat template and generation config, byte for byte. Nothing is changed.

    Args:
        llm: a ``vllm.LLM``.
        snapshot: the file.

    Raises:
        UnsupportedError: this engine's weights cannot be swapped, with the reason and the other ways.
        MismatchError: not by this snapshot, with the reason.
        FormatError, CorruptionError, StorageError: the file is unsound, or cannot be read.

    Example:
        >>> thaw_vllm.check_swap(llm, "fine-tune.thaw").bytes
        16060522496
    """
    answer = call(llm, "thaw_swap_check", {"path": path_of(snapshot)})
    return Swappable(answer["bytes"], answer["tensors"], answer["model"])


def pin_snapshot(llm: LLM, snapshot: str | os.PathLike[str]) -> int:
    """Have an engine hold a snapshot in page-locked host memory, for swaps at the speed of the link.

    Returns:
        Bytes that are held: the file's, where it lies on tmpfs without taking more memory. Until ``unpin_snapshot``, or
        the engine's end.

    Raises:
        FormatError, StorageError, DeviceError: as ``pin``.
    """
    return int(call(llm, "thaw_swap_pin", {"path": path_of(snapshot), "release": False})["bytes"])


def unpin_snapshot(llm: LLM, snapshot: str | os.PathLike[str]) -> None:
    """Give that memory back; of a snapshot that is not held does nothing."""
    call(llm, "thaw_swap_pin", {"path": path_of(snapshot), "release": True})


def swap_weights(llm: LLM, snapshot: str | os.PathLike[str], *, verify: bool = True) -> SwapReport:
    """Put a snapshot's weights into a running engine, where its own are; graphs and compiled code stay.

    What ``check_swap`` refuses is refused before anything is changed. Then caches of what the old weights made are
    emptied (prefix, encoder and multimodal), the weights are filled, and a canary is asked: a greedy answer of four
    tokens with finite log-probabilities. Only then does this return.

    Args:
        llm: a ``vllm.LLM`` without unfinished requests.
        snapshot: the file; from page-locked memory where ``pin_snapshot`` holds it.
        verify: hold every chunk against its checksum once it is on the GPU, which costs next to nothing there.

    Raises:
        UsageError: requests are running, or the engine is asleep.
        UnsupportedError, MismatchError, FormatError, CorruptionError, StorageError: nothing was changed.
        BrokenEngineError: it failed half-way, so that the engine has been closed; start another one.

    Example:
        >>> thaw_vllm.swap_weights(llm, "fine-tune.thaw").aborted
        0
    """
    if llm.llm_engine.has_unfinished_requests():
        raise UsageError("requests are not finished; finish or abort them first")
    answer = call(llm, "thaw_swap", {"path": path_of(snapshot), "verify": verify})
    if "broken" in answer:
        close(llm.llm_engine.engine_core)
        raise broken(answer["broken"])
    return SwapReport(**answer)


async def swap_weights_async(
    engine: AsyncLLM, snapshot: str | os.PathLike[str], *, verify: bool = True, deadline: float = DEADLINE
) -> SwapReport:
    """``swap_weights`` for an ``AsyncLLM``.

    Requests that run may end until the deadline; what is left then, and what is sent before this returns, is ended with
    the finish reason ``abort`` and can be sent again: no request sees both weights. An error that leaves the engine as
    it was lets the others go on.

    Args:
        engine: whose steps stop meanwhile.
        snapshot, verify: as of ``swap_weights``.
        deadline: seconds for requests to end; 0 ends them at once.
    """
    if deadline < 0:
        raise UsageError(f"deadline must be 0 or more seconds, not {deadline}")
    options = {"path": path_of(snapshot), "verify": verify}
    # Once begun it goes to its end, also where the caller is cancelled: half of it would let requests in too early.
    return await asyncio.shield(asyncio.ensure_future(_swap(engine, options, deadline)))


async def _swap(engine: AsyncLLM, options: dict[str, Any], deadline: float) -> SwapReport:
    await ask(engine, "thaw_swap_check", {"path": options["path"], "quick": True})
    await require_running(engine)
    await drain(engine, deadline)
    try:
        answer = await ask(engine, "thaw_swap", options)
    except BrokenEngineError:
        raise
    except ThawError:
        await watched(engine, engine.resume_generation())
        raise
    if "broken" in answer:
        await close_async(engine)
        raise broken(answer["broken"])
    try:
        await watched(engine, engine.reset_mm_cache())  # the front end's share
        late = await ask(engine, "thaw_swap_finish", {})
    except Exception as error:  # paused for ever otherwise
        await close_async(engine)
        raise broken(f"{type(error).__name__}: {error}") from error
    return SwapReport(**answer | {"aborted": answer["aborted"] + late["aborted"]})


async def require_running(engine: AsyncLLM) -> None:
    """Raises:
    UsageError: somebody has paused it, whose pause would be ended with the change.
    """
    if await watched(engine, engine.is_paused()):
        raise UsageError("the engine was paused by somebody; have it resumed first")


async def drain(engine: AsyncLLM, deadline: float) -> None:
    """Pause an engine, once its requests have ended or their time has; those that are left stay, for it to end them."""
    if not deadline:
        await watched(engine, engine.pause_generation(mode="keep", clear_cache=False))
        return
    waiting = asyncio.ensure_future(engine.pause_generation(mode="wait", clear_cache=False))
    await watched(engine, asyncio.wait([waiting], timeout=deadline))
    if waiting.done():
        await watched(engine, waiting)  # may have failed
    else:  # ends by itself, with the requests
        waiting.add_done_callback(lambda future: future.cancelled() or future.exception())


def close(client: Any) -> None:
    """End an engine's processes."""
    with contextlib.suppress(Exception):
        client.shutdown()


async def close_async(engine: AsyncLLM) -> None:
    """End an engine's processes, its requests having been told."""
    with contextlib.suppress(Exception):
        versions.fail_requests(engine, "thaw has closed this engine")
    await asyncio.sleep(0)
    await asyncio.to_thread(close, engine)


def broken(why: str) -> BrokenEngineError:
    """What to raise of an engine that has been closed."""
    return BrokenEngineError(f"the engine was left half-way, and has been closed: {why}; start another one")
