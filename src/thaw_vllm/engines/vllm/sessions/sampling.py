"""Sampling parameters as plain values, and what is left of them where a session goes on as another request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError, UsageError
from ....format.document import JSONObject

if TYPE_CHECKING:
    from vllm import SamplingParams

GENERATED = "thaw_generated"
"""In ``extra_args`` of a request, ``[N, M]``: of a prompt of M tokens the last N are the beginning of the answer. Of a
prompt of another length it says nothing, as where tokens were appended."""

_BY_RUNNER = ("seed", "presence_penalty", "frequency_penalty")
_BY_OUTPUT = (*_BY_RUNNER[1:], "bad_words", "repetition_detection", "thinking_token_budget", "extra_args")
"""What looks at the tokens generated so far; of the first ones it is proved that they go on where the engine rebuilds a
request."""

_OF_PROMPTS = frozenset(
    {"prompt_logprobs", "skip_reading_prefix_cache", "prompt_logprob_token_ids", "prompt_logprob_start"}
)
"""What was answered with the prompt; asked again, it would have the engine compute all of the session anew."""

_DELIVERY = frozenset({"output_kind", "stream_interval", "skip_clone"})
"""How answers are handed over, which front ends set as they need it."""


def to_json(params: SamplingParams | None) -> JSONObject | None:
    """What differs from vLLM's defaults, by name.

    Raises:
        UnsupportedError: it holds what is no plain value.
    """
    if params is None:
        return None
    import msgspec

    def refuse(value: Any) -> Any:
        raise TypeError(type(value).__name__)

    try:
        found, usual = (msgspec.to_builtins(one, str_keys=True, enc_hook=refuse) for one in (params, type(params)()))
    except TypeError as error:
        raise UnsupportedError(f"these sampling parameters hold a {error}, which no record can") from None
    kept = {name: value for name, value in found.items() if not name.startswith("_") and name not in _DELIVERY}
    kept |= {"extra_args": _unmarked(kept.get("extra_args"))}
    return {name: value for name, value in kept.items() if value != usual.get(name)}


def generated(params: Any, tokens: Sequence[int] | None) -> int:
    """How many of a request's last tokens are the beginning of its answer; 0 where that is not said, or cannot be.

    Args:
        params: vLLM's, of any request; None where it is not to be answered.
        tokens: the request's prompt; None where it is not of tokens.
    """
    said = (getattr(params, "extra_args", None) or {}).get(GENERATED)
    if tokens is None or not isinstance(said, (list, tuple)) or [*map(type, said)] != [int, int]:
        return 0
    count, total = said
    if total != len(tokens) or not 0 < count < total:
        return 0
    alone = params.structured_outputs is None and params.prompt_logprobs is None
    return count if alone else 0


def whole(params: SamplingParams, count: int) -> SamplingParams:
    """Those of an answer, of those of its rest after ``count`` tokens."""
    found = params.clone()
    found.extra_args = _unmarked(params.extra_args)
    if found.max_tokens is not None:
        found.max_tokens += count
    if found.min_tokens:
        found.min_tokens += count
    return found


def still_inexact(names: Sequence[str]) -> tuple[str, ...]:
    """Of the names that ``going_on`` gives those that stay where the engine rebuilds requests."""
    return tuple(name for name in names if name not in _BY_RUNNER)


def of_continuation(document: JSONObject, index: int) -> JSONObject:
    """Those of one of several continuations: vLLM adds its number to the seed."""
    own = {name: value for name, value in document.items() if name != "n"}
    return own if own.get("seed") is None else own | {"seed": own["seed"] + index}


def from_json(document: JSONObject) -> SamplingParams:
    """The parameters of a record.

    Raises:
        UnsupportedError: this vLLM does not know one of them, or does not take its value.
    """
    import msgspec
    from vllm import SamplingParams

    own = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    unknown = sorted(document.keys() - own)
    if unknown:
        raise UnsupportedError(
            f"this vLLM has no sampling parameter {unknown[0]!r}, which the session was sampled with; pass "
            "sampling_params"
        )
    try:
        return msgspec.convert(document, SamplingParams, str_keys=True, strict=False)
    except Exception as error:  # of msgspec's classes, Python's and vLLM's own
        raise UnsupportedError(f"this vLLM does not take the session's sampling parameters: {error}") from None


def going_on(document: JSONObject, generated: int, count: int) -> tuple[SamplingParams, tuple[str, ...]]:
    """Parameters for a request whose prompt is all of a session, and what of them may not be as if it had gone on.

    Lengths are made up for, and stop strings may begin in what was generated. An engine that does not rebuild requests
    (``versions.rebuilds``) counts that as part of the prompt: a seed begins its numbers anew there, and what looks back
    at generated tokens does not see these.

    Args:
        generated: tokens that the session has generated.
        count: all of its tokens.

    Returns:
        The parameters, for one continuation; and names of them by which the request may not be exactly the rest.

    Raises:
        UsageError: nothing is left of ``max_tokens``.
        UnsupportedError: the rest would obey other rules, as of a grammar that would begin again.
    """
    params = from_json({name: value for name, value in document.items() if name not in _OF_PROMPTS})
    for name, what in (("structured_outputs", "its grammar"), ("trace_decode_token_ids", "its trace")):
        if generated and getattr(params, name, None) is not None:
            raise UnsupportedError(
                f"in the middle of an answer a session would begin {what} again; branch at its prompt"
            )
    if params.max_tokens is not None:
        params.max_tokens -= generated
        if params.max_tokens <= 0:
            raise UsageError("the session has generated all of its max_tokens; pass sampling_params to go on")
    params.min_tokens = max(0, params.min_tokens - generated)
    params.n = 1
    if not generated:
        return params, ()
    inexact = [name for name in _BY_OUTPUT if getattr(params, name, None)]
    if params.seed is not None and params.temperature > 0:
        inexact.append("seed")
    params.extra_args = (params.extra_args or {}) | {GENERATED: [generated, count]}
    return params, tuple(sorted(inexact))


def _unmarked(extra: dict[str, Any] | None) -> dict[str, Any] | None:
    return {name: value for name, value in (extra or {}).items() if name != GENERATED} or None
