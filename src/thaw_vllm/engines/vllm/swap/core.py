"""The engine core's part of a swap and of parking; called through vLLM's utility calls, between two steps.

Order of a swap: everything is checked, weights are offered to other engines no more, requests that are left are
aborted, caches are emptied, the workers fill their weights, a canary is asked, caches are emptied again. A client that
was told so lets new requests in afterwards (``finish``): it knows by then under which name.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable
from typing import Any

from ....errors import DeviceError, MismatchError, ThawError, UnsupportedError, UsageError
from ....weights.waterfall import Phases
from .. import versions
from ..answers import all_raised, answering
from ..kv import watch

METHODS = (
    *("thaw_swap_check", "thaw_swap_pin", "thaw_swap", "thaw_swap_finish"),
    *("thaw_park_check", "thaw_park", "thaw_wake"),
)
Changed = tuple[list[dict[str, Any]], int, str | None]
"""What the workers said, how many requests were ended, and why the engine is broken; None where it is not."""
_CANARY_PROMPT, _CANARY_TOKENS = 8, 4


def install() -> None:
    """Give the engine core its methods, where this process has it; again does nothing."""
    core = versions.engine_core()
    if core is None:
        return
    for name, work in zip(METHODS, (check, hold, swap, finish, parkable, park, wake), strict=True):
        if not hasattr(core, name):
            setattr(core, name, answering(work))


def check(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whether the weights of a snapshot could take the place of this engine's; nothing is changed.

    Args:
        options: ``path``; ``quick``: where this engine has passed before, do without the walk over all that its model
            holds, most of a check's time: ``swap`` does it when the engine stands still.

    Returns:
        ``bytes`` and ``tensors`` (of a rank) that would be filled, the snapshot's ``model`` id, and ``contents``: the
        content id of each rank's file.
    """
    _whole(core)
    _awake(core)
    quick = options.get("quick", False) and getattr(core, "thaw_swappable", False)
    answers = _of_one_set(core.model_executor.collective_rpc("thaw_swap_check", args=(options["path"], quick)))
    core.thaw_swappable = True
    return {
        "bytes": sum(answer["bytes"] for answer in answers),
        "tensors": answers[0]["tensors"],
        "model": answers[0]["model"],
        "contents": [answer["content"] for answer in answers],
    }


def hold(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Have the workers hold a snapshot page-locked, or not any more.

    Args:
        options: ``path``; ``release``: give the memory back.
    """
    if not options["release"]:
        _whole(core)
    method = "thaw_unpin" if options["release"] else "thaw_pin"
    answers: list[dict[str, Any]] = core.model_executor.collective_rpc(method, args=(options["path"],))
    try:
        all_raised(answers)
    except ThawError:  # others may hold theirs
        core.model_executor.collective_rpc("thaw_unpin", args=(options["path"],))
        raise
    return answers[0] | {"bytes": sum(answer["bytes"] for answer in answers)}


def swap(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Fill the engine's weights from a snapshot.

    Args:
        options: ``path``; ``verify``: hold every chunk against its checksum.

    Returns:
        ``bytes``, ``model``, ``aborted`` (requests that were left) and ``seconds`` by phase; or ``broken``: why the
        engine is of no use any more, and will end when it is asked anything.

    Raises:
        UsageError: requests are running, and the engine was not paused.
        UnsupportedError, MismatchError, FormatError, StorageError: nothing was changed, the engine goes on.
        BusyError: as these, for now.
    """
    clock = Phases()
    _whole(core)
    _awake(core)
    paused = core.is_scheduler_paused()
    if not paused and versions.queued(core):
        raise UsageError("requests are running; wait for them, or pause the engine first")
    found = check(core, {"path": options["path"]})
    withdrawn = core.model_executor.collective_rpc("thaw_withdraw")
    try:
        all_raised(withdrawn)
        return _swapped(core, options, found, paused, clock)
    except ThawError:  # nothing was changed
        if any(answer.get("withdrawn") for answer in withdrawn):
            with contextlib.suppress(Exception):
                core.model_executor.collective_rpc("thaw_offer")
        raise


def _swapped(core: Any, options: dict[str, Any], found: dict[str, Any], paused: bool, clock: Phases) -> dict[str, Any]:
    clock.end("check")
    aborted = _abort(core)
    _forget(core)
    clock.end("drain")
    fill = {"path": options["path"], "contents": found["contents"], "verify": options["verify"]}

    def changed() -> Changed:
        answers, broken = _fill(core, fill)
        clock.end("fill")
        if broken is None:
            broken = _canary(core, paused)
            clock.end("canary")
        return answers, aborted, broken

    answers, _, broken = _to_the_end(core, changed)
    if broken is not None:
        return _close(core, broken)
    versions.name_weights(core, found["model"])
    return {
        "bytes": sum(answer["bytes"] for answer in answers),
        "model": found["model"],
        "aborted": aborted,
        "route": answers[0]["route"],
        "seconds": clock.seconds | {"total": clock.total},
    }


def finish(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Let requests in again; those that came while the engine was paused were meant for what it held before.

    Returns:
        ``aborted``: how many of these there were.
    """
    _whole(core)
    aborted = _abort(core)
    core.resume_scheduler()
    return {"aborted": aborted}


def parkable(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Whether an engine may be parked; nothing is changed.

    Args:
        options: ``keep_weights``: in host memory, rather than to read them again from their snapshot.

    Returns:
        ``pids`` of the workers; ``path`` of the snapshot and ``contents``, the content id of each rank's file, both
        None with ``keep_weights``.

    Raises:
        UsageError: the engine was started without sleep mode, or is asleep.
        UnsupportedError: its weights cannot be read again in place.
        MismatchError, StorageError: the snapshot is not there.
    """
    _whole(core)
    _awake(core)
    if not core.vllm_config.model_config.enable_sleep_mode:
        raise UsageError(
            "this engine was started without sleep mode; on an NVIDIA GPU, start it with enable_sleep_mode=True "
            "(--enable-sleep-mode)"
        )
    source: dict[str, Any] = {"path": None, "contents": None}
    if not options["keep_weights"]:
        if watch.weights_changed(core):
            raise UnsupportedError(
                "this engine's weights may have been changed since they were loaded (a call to its workers), so its "
                "snapshot would bring others; keep them in host memory meanwhile (keep_weights=True, --keep-weights)"
            )
        answers = _of_one_set(core.model_executor.collective_rpc("thaw_source"))
        source = {"path": answers[0]["path"], "contents": [answer["content"] for answer in answers]}
    pids = all_raised(core.model_executor.collective_rpc("thaw_pid"))
    return source | {"pids": [answer["pid"] for answer in pids]}


def park(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Give the memory of weights and KV cache back.

    Args:
        options: as of ``parkable``, whose errors are raised, too.

    Returns:
        What ``parkable`` does, and ``aborted`` requests; ``left``: bytes that each worker keeps on its GPU; ``seconds``
        by phase. Or ``broken``, as ``swap``.
    """
    clock = Phases()
    source = parkable(core, options)
    clock.end("check")
    aborted = _abort(core)
    clock.end("drain")
    try:
        core.sleep(1 if options["keep_weights"] else 2)
    except Exception as error:
        return _close(core, f"it could not be put to sleep: {type(error).__name__}: {error}")
    if not core.model_executor.is_sleeping:
        return _close(core, "it was asked to sleep, and has not")
    core.thaw_parked = wanted = {name: source[name] for name in ("path", "contents")}
    versions.keep_asleep(core)
    clock.end("sleep")
    try:
        answers = all_raised(core.model_executor.collective_rpc("thaw_trim"))
    except Exception:
        woken = wake(core, wanted | {"verify": True})
        if "broken" in woken:
            return woken
        raise
    clock.end("trim")
    return source | {
        "aborted": aborted,
        "left": [answer["left"] for answer in answers],
        "seconds": clock.seconds | {"total": clock.total},
    }


def wake(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Take the memory back, fill it, and let requests in.

    Args:
        options: ``path``, ``contents``: as ``park`` has told them; ``verify``.

    Returns:
        ``bytes`` filled, ``aborted`` requests, and ``seconds`` by phase; or ``broken``, as ``swap``.

    Raises:
        UsageError: it is not parked.
        MismatchError, StorageError, DeviceError: the snapshot is gone or another, or others have taken the GPU's
            memory; the engine sleeps on.
    """
    clock = Phases()
    _whole(core)
    parked = getattr(core, "thaw_parked", None)
    if parked is None:
        raise UsageError("the engine is not parked")
    if parked != {name: options[name] for name in parked}:
        raise UsageError("the engine was parked with another snapshot; wake it with what parking it last gave")
    fill = {"path": options["path"], "contents": options["contents"], "verify": options["verify"]}
    all_raised(core.model_executor.collective_rpc("thaw_wakeable", args=(fill,)))
    clock.end("check")
    answers, aborted, broken = _to_the_end(core, lambda: _awoken(core, fill, clock))
    if broken is not None:
        return _close(core, broken)
    core.thaw_parked = None
    return {
        "bytes": sum(answer["bytes"] for answer in answers),
        "aborted": aborted,
        "seconds": clock.seconds | {"total": clock.total},
    }


def _to_the_end(core: Any, change: Callable[[], Changed]) -> Changed:
    """What a change of the engine gives. One that is interrupted leaves it broken.

    Raises:
        ThawError: nothing was changed.
    """
    try:
        return change()
    except ThawError:
        raise
    except BaseException as error:  # also Ctrl-C, where the core is in its caller's process
        why = f"it was interrupted by {type(error).__name__}: {error}"
        if not isinstance(error, Exception):
            _close(core, why)
            raise
        return [], 0, why


def _awoken(core: Any, fill: dict[str, Any], clock: Phases) -> Changed:
    executor = core.model_executor
    answers: list[dict[str, Any]] = []
    try:
        if "weights" in executor.sleeping_tags:
            executor.wake_up(["weights"])
        clock.end("weights' memory")
        if fill["path"] is not None:
            answers, broken = _fill(core, fill)
            clock.end("fill")
            if broken is not None:
                return answers, 0, broken
        if executor.sleeping_tags:
            executor.wake_up(sorted(executor.sleeping_tags))
        clock.end("other memory")
    except ThawError:
        raise
    except Exception as error:
        return answers, 0, f"its memory did not come back: {type(error).__name__}: {error}"
    versions.let_wake(core)
    aborted = _abort(core)
    broken = _canary(core, paused=False)
    clock.end("canary")
    return answers, aborted, broken


def _fill(core: Any, fill: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The workers' answers, and why the weights are nobody's now; None where they are the snapshot's.

    Raises:
        ThawError: no worker has written anything.
    """
    try:
        answers = core.model_executor.collective_rpc("thaw_fill", args=(fill,))
    except Exception as error:  # a worker has died, or does not answer
        return [], f"the workers could not be asked to the end: {type(error).__name__}: {error}"
    refused = [answer for answer in answers if "error" in answer]
    if len(refused) == len(answers):
        all_raised(answers)
    told = [answer["broken"] for answer in answers if "broken" in answer] + [one["message"] for one in refused]
    if not told:
        watch.weights_known(core)
    return answers, next(iter(told), None)


def _of_one_set(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What workers say of their files; an error of theirs is raised.

    Raises:
        MismatchError: they have found files of several sets.
    """
    if len({answer["set"] for answer in all_raised(answers)}) > 1:
        raise MismatchError(
            "the ranks have found files of several sets under this path, as one that holds an older one page-locked "
            "does; unpin it and try again"
        )
    return answers


def _whole(core: Any) -> None:
    why = getattr(core, "thaw_broken", None)
    if why is not None:
        raise DeviceError(f"this engine is of no use any more: {why}; start another one")


def _awake(core: Any) -> None:
    if core.model_executor.is_sleeping:
        raise UsageError("the engine is asleep; wake it up first")


def _abort(core: Any) -> int:
    """End every request there is; how many there were. The engine is left paused if there were any."""
    count = versions.queued(core)
    if count:
        core.pause_scheduler(mode="abort", clear_cache=False)
    versions.run_dry(core)  # also steps that are under way
    if versions.queued(core):
        raise UnsupportedError(f"{versions.queued(core)} requests cannot be ended; nothing was changed")
    return count


def _forget(core: Any) -> None:
    """Empty every cache of what weights have made.

    Raises:
        UsageError: a cache is in use.
    """
    if core.reset_prefix_cache() is False:
        raise UsageError("blocks of the KV cache are in use, so the prefix cache cannot be emptied")
    core.reset_mm_cache()
    core.reset_encoder_cache()


def _canary(core: Any, paused: bool) -> str | None:
    """Why an answer of the new weights shows that something is wrong; None where it does not. Leaves no trace of it.

    Args:
        paused: whether the engine is to be paused afterwards.
    """
    try:
        core.resume_scheduler()
        size = versions.vocabulary(core)
        prompt = [(number * 7 + 1) % size for number in range(_CANARY_PROMPT)]
        tokens, chances = versions.ask_core(core, f"thaw-canary-{secrets.token_hex(8)}", prompt, _CANARY_TOKENS)
        _forget(core)
        if paused:
            core.pause_scheduler(mode="keep", clear_cache=False)
    except Exception as error:
        return f"the canary failed with {type(error).__name__}: {error}"
    if len(tokens) != _CANARY_TOKENS or not all(0 <= token < size for token in tokens):
        return f"the canary was answered with the tokens {tokens}"
    if len(chances) != _CANARY_TOKENS or not all(map(math.isfinite, chances)):
        return f"the canary's log-probabilities are {chances}"
    if versions.gives_log_probabilities(core) and max(chances) > 0:
        return f"the canary's log-probabilities are {chances}"
    return None


def _close(core: Any, why: str) -> dict[str, Any]:
    core.thaw_broken = why
    versions.close_core(core, f"thaw: this engine is of no use any more: {why}")
    return {"broken": why}
