"""One engine of a fork pool, in a process of its own: ``pool_worker SOCKET``; see ``pool``."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ....errors import BrokenEngineError, UsageError
from ....zygote import messages
from .. import versions
from . import sampling
from .api import checkout, checkpoint
from .forking import Branch, fork, parameters
from .pool_process import spelt, tell

if TYPE_CHECKING:
    from vllm import LLM

SHARE = 0.9
"""Of the device's memory, what the engines of a pool and their weights take together where nothing is said."""
_LOOK = 0.5
"""Seconds in which an engine's death is noticed."""


def main(path: str) -> int:
    """Make an engine and do what the pool asks, until it is gone.

    Exit status: 0; 1 where the engine could not be made, or has died, which the pool sees by the socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as pool:
        pool.connect(path)
        asked = messages.receive(pool)
        if asked is None:
            return 0
        try:
            llm = _engine(asked[0])
        except Exception as error:
            tell(pool, spelt(error))
            return 1
        threading.Thread(target=_watch, args=(llm,), daemon=True).start()
        tell(pool, {"ready": True})
        while (task := messages.receive(pool)) is not None:
            try:
                found = _prefilled(llm, task[0]) if task[0]["do"] == "prefill" else _forked(llm, task[0], pool)
            except (BrokenEngineError, versions.engine_dead()):
                return 1  # as if this process had died with it: others do what is missing
            except Exception as error:
                tell(pool, spelt(error))
            else:
                tell(pool, {"done": found})
    return 0


def _watch(llm: LLM) -> None:
    """End this process with its engine core, idle or not: whoever waits for a dead one's answer may wait for ever."""
    while not versions.has_died(llm.llm_engine.engine_core):
        time.sleep(_LOOK)
    os._exit(1)


def _engine(asked: dict[str, Any]) -> LLM:
    args, weights = dict(asked["engine_args"]), asked["weights"]
    if weights is not None or "gpu_memory_utilization" not in args:
        args["gpu_memory_utilization"] = _share(args.get("gpu_memory_utilization"), asked["workers"], weights)
    if asked["snapshot"] is not None:
        from ..api import load

        if weights is not None:
            extra = args.get("model_loader_extra_config", {})
            args["model_loader_extra_config"] = extra | {"shared": weights["socket"]}
        return load(asked["model"], asked["snapshot"], **args)
    from vllm import LLM

    return LLM(model=asked["model"], **args)


def _share(given: float | None, workers: int, weights: dict[str, Any] | None) -> float:
    """Of the device's memory, an engine's without its part of the weights that it shares.

    Args:
        given: with its part.
        weights: ``bytes``, and the ``memory`` of the GPU; None: it shares none.

    Raises:
        UsageError: nothing is left.
    """
    whole = SHARE / workers if given is None else given
    if weights is None or not weights["memory"]:
        return whole
    part: float = weights["bytes"] / weights["memory"] / workers
    if part >= whole:
        raise UsageError(
            f"weights of {weights['bytes'] / 1e9:.1f} GB leave nothing of the GPU's {weights['memory'] / 1e9:.1f} GB "
            f"to {workers} engines that may take {whole:.2f} of it each"
        )
    return whole - part


def _prefilled(llm: LLM, task: dict[str, Any]) -> dict[str, Any]:
    """A prompt computed and kept; ``session``."""
    from vllm import SamplingParams

    prompt: Any = {"prompt_token_ids": task["tokens"]}
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
    about = {"store": task["store"], "model_id": task["model_id"]}
    return {"session": checkpoint(llm, task["tokens"], ttl=task["ttl"], **about).session}


def _forked(llm: LLM, task: dict[str, Any], pool: socket.socket) -> dict[str, Any]:
    """Some of a fork's branches, each sent as it ends."""
    about = {"store": task["store"], "model_id": task["model_id"]}
    given, first = None if task["sampling"] is None else sampling.from_json(task["sampling"]), task["first"]
    params = parameters(given, task["append"], task["store"], task["session"])
    there = checkout(llm, task["session"], sampling_params=params, **about)
    each = there.sampling_params.clone()
    if each.seed is not None:
        each.seed += first
    branches = fork(
        llm,
        there,
        task["count"],
        each,
        append=task["append"],
        keep=task["keep"],
        labels=task["labels"],
        ttl=task["ttl"],
        **about,
    )
    for branch in branches:
        if isinstance(branch.error, BrokenEngineError):
            raise branch.error
        tell(pool, {"branch": _told(branch, first)})
    return {}


def _told(branch: Branch, first: int) -> dict[str, Any]:
    own = branch.output.outputs[0]
    steps = own.logprobs
    return {
        "number": first + branch.number,
        "token_ids": list(own.token_ids),
        "text": own.text,
        "logprobs": steps and [[[token, entry.logprob] for token, entry in at.items()] for at in steps],
        "finish_reason": own.finish_reason,
        "stop_reason": own.stop_reason,
        "cached": branch.output.num_cached_tokens,
        "parent": branch.parent,
        "session": branch.session,
        "error": None if branch.error is None else spelt(branch.error),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
