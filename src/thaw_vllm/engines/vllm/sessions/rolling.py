"""What ``thaw demo rollouts`` has its process do: one prompt forked into seeded answers, each kept, token by token."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .... import __version__
from ....errors import UsageError
from ....sessions.rollouts import single
from ..versions import vllm_version
from . import sampling
from .forking import fork

if TYPE_CHECKING:
    from vllm import LLM


def roll(llm: LLM, asked: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Fork a prompt, keep every answer, and tell what a record of rollouts takes of them.

    Args:
        llm: whose ``logprobs_mode`` is ``raw_logprobs``.
        asked: ``prompt``, token ids; ``n``; ``sampling``, arguments of ``SamplingParams`` with ``seed`` and
            ``logprobs`` among them; ``store``; ``model_id``.
        seconds: takes what the forking took, all answers and sessions included.

    Returns:
        ``session`` of the prompt; ``rollouts`` (seed, session, finished, text, steps), ``pieces``, ``sampling`` and
        ``versions`` as a record has them.

    Raises:
        UsageError: the parameters have no seed.
        ThawError: an answer could not be kept.
    """
    from vllm import SamplingParams

    params = SamplingParams(**asked["sampling"])
    if params.seed is None:  # which -1 means to vLLM
        raise UsageError("rollouts need a seed from 0, for a record says of each which it had")
    warm = SamplingParams(max_tokens=2, seed=0, logprobs=params.logprobs)
    llm.generate([{"prompt_token_ids": [*range(5, 69)]}], warm, use_tqdm=False)  # what a first request waits for
    count = asked["sampling"]["logprobs"]
    seeds = [params.seed + number for number in range(asked["n"])]
    names = [f"rollout {seed}" for seed in seeds]
    about = {"store": asked["store"], "model_id": asked["model_id"], "labels": names}
    start = time.perf_counter()
    branches = sorted(fork(llm, asked["prompt"], asked["n"], params, keep=True, **about), key=lambda one: one.number)
    seconds["fork"] = time.perf_counter() - start
    pieces: dict[str, str] = {}
    rollouts = []
    for branch in branches:
        if branch.error is not None:
            raise branch.error
        (own,) = branch.output.outputs
        rollouts.append(
            {
                "seed": seeds[branch.number],
                "session": branch.session,
                "finished": own.finish_reason,
                "text": own.text,
                "steps": [_step(*pair, count, pieces) for pair in zip(own.token_ids, own.logprobs, strict=True)],
            }
        )
    common = {name: value for name, value in (sampling.to_json(params) or {}).items() if name != "seed"}
    return {
        "session": branches[0].parent,
        "rollouts": rollouts,
        "pieces": pieces,
        "sampling": common,
        "versions": {
            "thaw": __version__,
            "vllm": vllm_version(),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    }


def _step(token: int, at: Any, count: int, pieces: dict[str, str]) -> dict[str, Any]:
    """A sampled token.

    Args:
        at: vLLM's log-probabilities there, by token: of the ``count`` most likely ones, and its own.
        pieces: takes the text of each.
    """
    pieces |= {str(other): one.decoded_token or "" for other, one in at.items()}
    likely = sorted((one.rank, other) for other, one in at.items() if one.rank <= count)
    top = [[other, single(at[other].logprob)] for _, other in likely]
    return {"token": token, "logprob": single(at[token].logprob), "rank": at[token].rank, "top": top}
