"""What ``thaw demo fork`` has its processes do: a conversation forked, a branch chosen, rewound; taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ....sessions.branch import branch
from ....sessions.store import Store
from .api import checkout, checkpoint, resume
from .forking import fork

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


def begin(llm: LLM, asked: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """A long conversation is begun and kept, and forked into hypotheses; one is chosen, and the beginning rewound.

    Args:
        asked: ``context``, ``hypotheses`` and ``follow_up``, as lists of token ids; ``max_tokens``; ``store``;
            ``model_id``.
        seconds: takes what each step took.

    Returns:
        ``trunk``, ``branches`` (number, session, score, text), ``chosen``, ``rewound``, ``outputs``: the answer to the
        follow-up, and ``bytes`` that the store took for the trunk and for all.
    """
    from vllm import SamplingParams

    about = {"store": asked["store"], "model_id": asked["model_id"]}
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], logprobs=1)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name] = time.perf_counter() - start
        return found

    def ask(tokens: list[int]) -> RequestOutput:
        return llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0]

    ask([*range(5, 69)])  # what a first request has to wait for is not what is shown
    context, hypotheses = asked["context"], asked["hypotheses"]
    llm.reset_prefix_cache()
    first = SamplingParams(max_tokens=1)
    timed("context", lambda: llm.generate([{"prompt_token_ids": context}], first, use_tqdm=False))
    trunk = timed("checkpoint", lambda: checkpoint(llm, context, labels=["trunk"], **about))
    there = checkout(llm, trunk.session, sampling_params=params, **about)
    names = [f"hypothesis {number}" for number in range(len(hypotheses))]
    forked = timed(
        "fork",
        lambda: [*fork(llm, there, len(hypotheses), params, append=hypotheses, keep=True, labels=names, **about)],
    )
    alone = []
    for tokens in hypotheses:
        llm.reset_prefix_cache()
        start = time.perf_counter()
        alone.append(ask([*context, *tokens]))
        seconds["alone"] = seconds.get("alone", 0.0) + time.perf_counter() - start
    branches = [
        {"number": one.number, "session": one.session, "score": _score(one.output), "text": one.output.outputs[0].text}
        for one in sorted(forked, key=lambda one: one.number)
    ]
    chosen = max(branches, key=lambda one: one["score"])
    store = Store(asked["store"])
    rewound = timed("rewind", lambda: branch(store, chosen["session"], len(context) // 2, labels=["rewound"]))
    answer, _ = resume(llm, chosen["session"], append=asked["follow_up"], sampling_params=params, **about)
    return {
        "trunk": trunk.session,
        "branches": branches,
        "chosen": chosen["session"],
        "rewound": rewound,
        "bytes": {"trunk": trunk.bytes, "all": sum(path.stat().st_size for path in store.block_files())},
        "outputs": [_told(answer)],
    }


def again(llm: LLM, asked: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """In another process: the chosen branch is taken up, and asked the same.

    Args:
        asked: as of ``begin``, and ``session``.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], logprobs=1)
    llm.generate([{"prompt_token_ids": [*range(5, 69)]}], params, use_tqdm=False)
    about = {"store": asked["store"], "model_id": asked["model_id"], "append": asked["follow_up"]}
    there = checkout(llm, asked["session"], sampling_params=params, **about)
    seconds["checkout"] = there.seconds
    start = time.perf_counter()
    (answer,) = llm.generate([there.prompt], params, use_tqdm=False)
    seconds["answer"] = time.perf_counter() - start
    return {"cached": answer.num_cached_tokens, "tokens": there.tokens, "outputs": [_told(answer)]}


def _score(output: RequestOutput) -> float:
    """Log-probability of an answer, per token."""
    own = output.outputs[0]
    values = [float(at[token].logprob) for token, at in zip(own.token_ids, own.logprobs or [], strict=True)]
    return sum(values) / max(1, len(values))


def _told(output: RequestOutput) -> dict[str, Any]:
    own = output.outputs[0]
    steps = [sorted((token, entry.logprob) for token, entry in at.items()) for at in own.logprobs or []]
    return {"text": own.text, "tokens": list(own.token_ids), "logprobs": steps}
