"""A ``vllm.LLM`` that is asked with token ids, and timed as its caller sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...errors import ThawError

_TRIES, _PAUSE = 50, 0.1
"""Resets of the prefix cache, and seconds between them: blocks of a request that has just ended may be in use still."""


class Prompted:
    """An engine of its own. A context manager: leaving it ends the engine's processes."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        """Start it.

        Args:
            model: a model directory.
            engine_args: of ``vllm.LLM``.
        """
        from vllm import LLM

        self.llm = LLM(model=model, **engine_args)

    def first_token(self, ids: Sequence[int]) -> tuple[float, int]:
        """Seconds to the first token, and how many tokens of the prompt were cached."""
        sampling = self._sampling(1)
        start = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, int(output.num_cached_tokens or 0)

    def at_once(self, prompts: Sequence[Any], sampling: Sequence[Any]) -> tuple[float, list[Any]]:
        """Seconds until all of several requests have ended, and vLLM's answers in their order.

        Args:
            prompts: as ``generate`` takes them.
            sampling: parameters of each.
        """
        start = time.perf_counter()
        outputs = self.llm.generate(list(prompts), list(sampling), use_tqdm=False)
        return time.perf_counter() - start, list(outputs)

    def answer(self, ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """A greedy answer that no end token ends: ``tokens``, the log-probability of each, ``cached`` as above."""
        sampling = self._sampling(max_tokens, logprobs=1)
        (output,) = self.llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        made = output.outputs[0]
        tokens = [int(token) for token in made.token_ids]
        logprobs = [float(step[token].logprob) for token, step in zip(tokens, made.logprobs or [], strict=True)]
        return {"tokens": tokens, "logprobs": logprobs, "cached": int(output.num_cached_tokens or 0)}

    def forget(self) -> None:
        """Empty the prefix cache.

        Raises:
            ThawError: the engine does not.
        """
        for _ in range(_TRIES):
            if self.llm.reset_prefix_cache():
                return
            time.sleep(_PAUSE)
        raise ThawError("the engine does not reset its prefix cache; its log says why")

    @staticmethod
    def _sampling(max_tokens: int, **more: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)

    def __enter__(self) -> Prompted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's processes, so that its memory is free for the next one."""
        client: Any = self.llm.llm_engine.engine_core
        client.shutdown()
