"""Python calls: an engine that gives its GPU back, and takes it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....errors import BrokenEngineError, DeviceError, MismatchError, ThawError, UnsupportedError, UsageError
from ....transport import process_checkpoint
from ....weights.open import open_snapshot
from ..client import WAKE, ask, call, mark_parked, require_awake, watched
from ..kv.api import freeze_kv_cache, freeze_kv_cache_async, restore_kv_cache, restore_kv_cache_async
from .api import DEADLINE, broken, close, close_async, drain, require_running

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM

_LOCKING = 30.0
"""Seconds that the driver may wait for work on the GPU to end; there is none once an engine sleeps."""


@dataclass(frozen=True)
class Parked:
    """An engine that has given its GPU back; what ``wake`` needs.

    Attributes:
        pids: of its workers.
        driver: whether the driver carries the rest of their CUDA state, so that nothing of them is on the GPU.
        why: why it does not; empty where it does.
        left: bytes of the GPU's memory that were in use, by other processes, too, before the driver took its part.
        path: the snapshot that brings the weights back; None where they are in host memory.
        contents: the content id of each rank's file of it; None where ``path`` is.
        kv: the file of KV blocks to restore; None for none.
        aborted: requests that were ended for it (finish reason ``abort``); they can be sent again.
        seconds: by phase (``KV``, ``check``, ``drain``, ``sleep``, ``trim``, ``driver``), and ``total``.
    """

    pids: list[int]
    driver: bool
    why: str
    left: int
    path: str | None
    contents: list[str | None] | None
    kv: str | None
    aborted: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WakeReport:
    """How an engine woke.

    Attributes:
        bytes: of weights that were filled; 0 where they were in host memory.
        blocks: of KV cache that were restored.
        aborted: requests that were sent meanwhile and ended (finish reason ``abort``); they can be sent again.
        lost: why the KV blocks are not there, where they were to be; the engine answers without them.
        seconds: by phase (``driver``, ``check``, ``weights' memory``, ``fill``, ``other memory``, ``canary``, ``KV``),
            and ``total``.
    """

    bytes: int
    blocks: int
    aborted: int
    lost: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def park(
    llm: LLM,
    *,
    kv: str | os.PathLike[str] | None = None,
    keep_weights: bool = False,
    driver: bool | None = None,
    force: bool = False,
) -> Parked:
    """Have an engine give its GPU back; ``wake`` brings it back with its graphs and compiled code.

    Weights are dropped, since their snapshot has them, and the KV cache with them (vLLM's sleep, level 2). Then
    NVIDIA's driver takes what is left of the workers' CUDA state into host memory, where this process may ask it to
    (root, or a container with the capabilities that ``thaw doctor`` names): nothing of the engine stays on the GPU.
    Else what a CUDA context and graphs take stays, 0.5 to 1 GB.

    Args:
        llm: a ``vllm.LLM`` without unfinished requests, started from a snapshot with ``enable_sleep_mode=True``, whose
            weights may be filled again (``check_swap``).
        kv: freeze what is cached into this file first, and restore it on waking.
        keep_weights: in host memory (level 1, as many bytes, page-locked) rather than dropped; for engines whose
            weights may not be filled again.
        driver: None: where it can and may; True: or fail, the engine awake; False: not.
        force: replace the file ``kv``.

    Returns:
        What ``wake`` needs. The engine's processes live on; they end with this one.

    Raises:
        UsageError: requests are running, or the engine sleeps, or was started without sleep mode.
        UnsupportedError: its weights may not be filled again, or the driver cannot; the engine is awake.
        MismatchError, StorageError: its snapshot is gone, or another by now; the engine is awake.
        DeviceError: the driver refused, with ``driver=True``; the engine is awake.
        BrokenEngineError: it was left half-way, or has died, and has been closed; start another one.

    Example:
        >>> parked = thaw_vllm.park(llm)
        >>> thaw_vllm.wake(llm, parked).bytes
        16060522496
    """
    require_awake(llm)
    if llm.llm_engine.has_unfinished_requests():
        raise UsageError("requests are not finished; finish or abort them first")
    start = time.perf_counter()
    _require_driver(driver, call(llm, "thaw_park_check", {"keep_weights": keep_weights})["pids"])
    kept = None
    if kv is not None:
        kept = _nothing_is_fine(lambda: freeze_kv_cache(llm, kv, force=force).path)
    frozen = time.perf_counter()
    answer = call(llm, "thaw_park", {"keep_weights": keep_weights})
    if "broken" in answer:
        close(llm.llm_engine.engine_core)
        raise broken(answer["broken"])
    parked = _parked(answer, kept, frozen - start)
    mark_parked(llm, True)
    try:
        return _checkpointed(parked, driver, start)
    except BrokenEngineError:
        close(llm.llm_engine.engine_core)
        raise
    except DeviceError:
        if _at_large(parked):
            wake(llm, parked)
        raise


def wake(llm: LLM, parked: Parked, *, verify: bool = True) -> WakeReport:
    """Bring a parked engine back: driver, memory, weights from the snapshot, a canary, KV blocks.

    Args:
        llm: the same engine.
        parked: what ``park`` gave.
        verify: hold every chunk of the snapshot against its checksum once it is on the GPU.

    Raises:
        MismatchError, StorageError: the snapshot is gone, or another by now; the engine stays asleep: put it back.
        DeviceError: others have taken the GPU's memory, or the driver could not restore a process; the message says
            whether its state is lost, else ask again later.
        BrokenEngineError: it failed half-way, or has died, so that the engine has been closed; start another one.
    """
    start = time.perf_counter()
    _look(parked)
    try:
        _restored(parked)
    except BrokenEngineError:
        close(llm.llm_engine.engine_core)
        raise
    restored = time.perf_counter()
    answer = call(llm, WAKE, {"path": parked.path, "contents": parked.contents, "verify": verify})
    if "broken" in answer:
        close(llm.llm_engine.engine_core)
        raise broken(answer["broken"])
    mark_parked(llm, False)
    thawed = time.perf_counter()
    blocks, lost = 0, ""
    try:
        blocks = restore_kv_cache(llm, parked.kv).blocks if parked.kv is not None else 0
    except ThawError as error:
        lost = str(error)
    return _woken(answer, blocks, lost, restored - start, time.perf_counter() - thawed, start)


async def park_async(
    engine: AsyncLLM,
    *,
    kv: str | os.PathLike[str] | None = None,
    keep_weights: bool = False,
    driver: bool | None = None,
    force: bool = False,
    deadline: float = DEADLINE,
) -> Parked:
    """``park`` for an ``AsyncLLM``.

    Args:
        deadline: seconds in which running requests may end; what is left is ended with the finish reason ``abort``.
            What is sent while it is parked waits until it is woken, and is ended then.

    Once begun it goes to its end. Where the caller is cancelled meanwhile the engine is woken again, since nobody would
    know what it takes to wake it.
    """
    parking = asyncio.ensure_future(
        _park(engine, kv, keep_weights=keep_weights, driver=driver, force=force, deadline=deadline)
    )
    try:
        return await asyncio.shield(parking)
    except asyncio.CancelledError:
        waking = asyncio.ensure_future(_undone(engine, parking))
        _waking.add(waking)  # the event loop holds tasks weakly
        waking.add_done_callback(_waking.discard)
        raise


_waking: set[asyncio.Future[None]] = set()


async def _undone(engine: AsyncLLM, parking: asyncio.Future[Parked]) -> None:
    """Wake what nobody will wake."""
    with contextlib.suppress(ThawError):
        await _wake(engine, await parking, verify=True)


async def _park(
    engine: AsyncLLM,
    kv: str | os.PathLike[str] | None,
    *,
    keep_weights: bool,
    driver: bool | None,
    force: bool,
    deadline: float,
) -> Parked:
    start = time.perf_counter()
    kept = None
    require_awake(engine)
    if deadline < 0:
        raise UsageError(f"deadline must be 0 or more seconds, not {deadline}")
    checked = await ask(engine, "thaw_park_check", {"keep_weights": keep_weights})
    _require_driver(driver, checked["pids"])
    await require_running(engine)
    if kv is not None:
        try:
            kept = (await freeze_kv_cache_async(engine, kv, force=force)).path
        except UsageError as error:
            _only_nothing(error)
    frozen = time.perf_counter()
    await drain(engine, deadline)
    try:
        answer = await ask(engine, "thaw_park", {"keep_weights": keep_weights})
    except ThawError:
        with contextlib.suppress(Exception):  # as of an engine that vLLM's own sleep has put to sleep
            await watched(engine, engine.resume_generation())
        raise
    if "broken" in answer:
        await close_async(engine)
        raise broken(answer["broken"])
    parked = _parked(answer, kept, frozen - start)
    mark_parked(engine, True)
    try:
        return await asyncio.to_thread(_checkpointed, parked, driver, start)
    except BrokenEngineError:
        await close_async(engine)
        raise
    except DeviceError:
        if _at_large(parked):
            await _wake(engine, parked, verify=True)
        raise


async def wake_async(engine: AsyncLLM, parked: Parked, *, verify: bool = True) -> WakeReport:
    """``wake`` for an ``AsyncLLM``; once begun it goes to its end, also where the caller is cancelled."""
    return await asyncio.shield(asyncio.ensure_future(_wake(engine, parked, verify)))


async def _wake(engine: AsyncLLM, parked: Parked, verify: bool) -> WakeReport:
    start = time.perf_counter()
    await asyncio.to_thread(_look, parked)
    try:
        await asyncio.to_thread(_restored, parked)
    except BrokenEngineError:
        await close_async(engine)
        raise
    restored = time.perf_counter()
    answer = await ask(engine, WAKE, {"path": parked.path, "contents": parked.contents, "verify": verify})
    if "broken" in answer:
        await close_async(engine)
        raise broken(answer["broken"])
    mark_parked(engine, False)
    thawed = time.perf_counter()
    blocks, lost = 0, ""
    try:
        blocks = (await restore_kv_cache_async(engine, parked.kv)).blocks if parked.kv is not None else 0
    except ThawError as error:
        lost = str(error)
    return _woken(answer, blocks, lost, restored - start, time.perf_counter() - thawed, start)


def _nothing_is_fine(freeze: Any) -> str | None:
    """The file's path; None where nothing is cached."""
    try:
        return str(freeze())
    except UsageError as error:
        _only_nothing(error)
        return None


def _only_nothing(error: UsageError) -> None:
    if "nothing to freeze" not in str(error):
        raise error


def _parked(answer: dict[str, Any], kv: str | None, freezing: float) -> Parked:
    seconds = ({"KV": freezing} if kv is not None else {}) | answer["seconds"]
    return Parked(
        pids=answer["pids"],
        driver=False,
        why="",
        left=max(answer["left"]),
        path=answer["path"],
        contents=answer["contents"],
        kv=kv,
        aborted=answer["aborted"],
        seconds=seconds,
    )


def _checkpointed(parked: Parked, driver: bool | None, start: float) -> Parked:
    """Have the driver take its part, where that is asked for and can be.

    Raises:
        DeviceError: it may not, and was to; or it has left a process half-way.
        BrokenEngineError: a process has ended.
    """
    begun, why = time.perf_counter(), "it was not to be asked" if driver is False else _obstacle(parked.pids)
    if why is None:
        try:
            process_checkpoint.park(parked.pids, timeout=_LOCKING)
        except DeviceError as error:
            _require_living(parked, error)
            if driver or not _at_large(parked):
                raise
            why = str(error)
    now = time.perf_counter()
    seconds = parked.seconds | {"driver": now - begun, "total": now - start}
    return replace(parked, driver=why is None, why=why or "", seconds=seconds)


def _restored(parked: Parked) -> None:
    """Have the driver give back what it has.

    Raises:
        DeviceError: it could not.
        BrokenEngineError: a process has ended.
    """
    if parked.driver:
        try:
            process_checkpoint.wake(parked.pids)
        except DeviceError as error:
            _require_living(parked, error)
            raise


def _require_living(parked: Parked, error: DeviceError) -> None:
    """Raises:
    BrokenEngineError: one of its processes has ended, so that nothing brings the engine back.
    """
    if any(process_checkpoint.has_ended(pid) for pid in parked.pids):
        raise BrokenEngineError(f"the engine has died meanwhile: {error}; start another one") from error


def _at_large(parked: Parked) -> bool:
    """Whether the driver holds none of its processes, as far as it tells."""
    try:
        return all(process_checkpoint.state(pid) == "running" for pid in parked.pids)
    except UnsupportedError:  # it could not have taken one
        return True
    except DeviceError:
        return False


def _require_driver(driver: bool | None, pids: list[int]) -> None:
    """Raises:
    UnsupportedError: it cannot take these processes' state, and must.
    """
    if driver and (why := _obstacle(pids)) is not None:
        raise UnsupportedError(f"NVIDIA's driver cannot take the engine's state: {why}")


def _obstacle(pids: list[int]) -> str | None:
    """Why the driver cannot take this engine's state; None where nothing speaks against it."""
    if os.getpid() in pids:
        return "the engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), which cannot stop itself"
    if len(pids) > 1:
        return "it has several ranks, whose communication would wait for one another for ever"
    return process_checkpoint.unsupported()


def _look(parked: Parked) -> None:
    """That the snapshot is there, before anything is woken.

    Raises:
        MismatchError, StorageError: it is not; the engine stays parked.
    """
    if parked.path is None or parked.contents is None:
        return
    with open_snapshot(parked.path, with_chunks=False) as opened:
        if opened.snapshot.header.content != parked.contents[0]:
            raise MismatchError(
                f"{parked.path!r} is not the snapshot any more that the parked engine was filled from; put it back"
            )


def _woken(answer: dict[str, Any], blocks: int, lost: str, driver: float, kv: float, start: float) -> WakeReport:
    inside = {name: value for name, value in answer["seconds"].items() if name != "total"}
    seconds = {"driver": driver} | inside | {"KV": kv, "total": time.perf_counter() - start}
    return WakeReport(answer["bytes"], blocks, answer["aborted"], lost, seconds)
