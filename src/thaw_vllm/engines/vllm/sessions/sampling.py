"""Sampling parameters as plain values, and what is left of them where a session goes on as another request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError, UsageError
from ....format.document import JSONObject

if TYPE_CHECKING:
    from vllm import SamplingParams

_BY_OUTPUT = (
    *("presence_penalty", "frequency_penalty", "bad_words", "stop"),
    *("thinking_token_budget", "repetition_detection", "extra_args"),
)
_OF_PROMPTS = frozenset(
    {"prompt_logprobs", "skip_reading_prefix_cache", "prompt_logprob_token_ids", "prompt_logprob_start"}
)
"""What was answered with the prompt; asked again, it would have the engine compute all of the session anew."""
"""What looks at the tokens generated so far, which a new request has as part of its prompt."""

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
    return {name: value for name, value in kept.items() if value != usual.get(name)}


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


def going_on(document: JSONObject, generated: int) -> tuple[SamplingParams, tuple[str, ...]]:
    """Parameters for a request whose prompt is all of a session, and what of them will not be as if it had gone on.

    The engine counts what the session has generated as part of that request's prompt. Lengths are made up for; a seed
    begins its numbers anew, and what looks back at generated tokens does not see these.

    Args:
        generated: tokens that the session has generated.

    Returns:
        The parameters, for one continuation; names of parameters, empty where the request is exactly the rest.

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
    inexact = [name for name in _BY_OUTPUT if generated and getattr(params, name, None)]
    if generated and params.seed is not None and params.temperature > 0:
        inexact.append("seed")
    return params, tuple(sorted(inexact))
