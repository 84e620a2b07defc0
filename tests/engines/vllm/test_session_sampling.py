"""Sampling parameters on their way into a record and out of it, and what is left of them."""

import json

import pytest

from thaw_vllm.errors import UnsupportedError, UsageError

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from thaw_vllm.engines.vllm.sessions.sampling import (
    GENERATED,
    from_json,
    generated,
    going_on,
    of_continuation,
    still_inexact,
    to_json,
    whole,
)


def params(**values):
    return SamplingParams(max_tokens=20, **values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7, "seed": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"stop": ["\n\n", "END"], "stop_token_ids": [2], "include_stop_str_in_output": True},
        {"logit_bias": {7: -1.5}, "bad_words": ["no"], "allowed_token_ids": [1, 2]},
        {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logprobs": 3},
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
        {"n": 3, "ignore_eos": True, "min_tokens": 4},
    ],
)
def test_they_come_back(values):
    made = params(**values)
    document = json.loads(json.dumps(to_json(made)))
    assert repr(from_json(document)) == repr(made)
    assert not any(name.startswith("_") for name in document) and "output_kind" not in document


def test_of_several_continuations_each_has_a_seed_of_its_own():
    """As vLLM has it."""
    from vllm.v1.engine.parallel_sampling import ParentRequest

    made = params(n=3, seed=5)
    parent = ParentRequest.__new__(ParentRequest)
    parent.sampling_params, parent.cached_child_sampling_params = made, None
    document = to_json(made)
    for index in range(3):
        child = parent._get_child_sampling_params(index)
        assert of_continuation(document, index) == to_json(child)
    assert of_continuation(to_json(params(n=2)), 1) == {"max_tokens": 20}


def test_defaults_take_no_room():
    assert to_json(SamplingParams()) == {} and to_json(None) is None


def test_what_is_no_plain_value():
    with pytest.raises(UnsupportedError, match="hold a object"):
        to_json(params(extra_args={"hook": object()}))


@pytest.mark.parametrize("document", [{"warp": 9}, {"temperature": "hot"}, {"temperature": -1}])
def test_what_this_engine_does_not_take(document):
    with pytest.raises(UnsupportedError, match="sampling parameter"):
        from_json(document)


def test_lengths_are_made_up_for():
    found, inexact = going_on(to_json(params(min_tokens=10, n=2)), 8, 20)
    assert (found.max_tokens, found.min_tokens, found.n, inexact) == (12, 2, 1, ())
    assert going_on(to_json(params(min_tokens=3)), 8, 20)[0].min_tokens == 0
    with pytest.raises(UsageError, match="all of its max_tokens"):
        going_on(to_json(params()), 20, 20)


INEXACT = [
    ({"seed": 1}, ("seed",)),
    ({"seed": 1, "temperature": 0.0}, ()),
    ({"presence_penalty": 0.1, "frequency_penalty": -0.2}, ("frequency_penalty", "presence_penalty")),
    ({"repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "stop_token_ids": [4], "top_k": 3}, ()),
    ({"stop": ["x"], "bad_words": ["y"]}, ("bad_words",)),
    ({"extra_args": {"z": 1}, "seed": 1}, ("extra_args", "seed")),
]


@pytest.mark.parametrize(("values", "names"), INEXACT)
def test_what_would_not_be_the_same_is_named(values, names):
    document = to_json(params(**values))
    assert going_on(document, 1, 20)[1] == names
    assert going_on(document, 0, 20)[1] == ()


def test_what_an_engine_that_rebuilds_requests_does_not_see_either():
    names = ("extra_args", "frequency_penalty", "presence_penalty", "seed", "bad_words", "repetition_detection")
    assert still_inexact(names) == ("extra_args", "bad_words", "repetition_detection")


def test_the_rest_says_of_what_it_is_the_rest_and_records_do_not():
    made = params(seed=1, min_tokens=10, extra_args={"z": 1})
    rest, _ = going_on(to_json(made), 8, 20)
    assert rest.extra_args == {"z": 1, GENERATED: [8, 20]} and generated(rest, [*range(20)]) == 8
    assert to_json(rest)["extra_args"] == {"z": 1}
    assert to_json(whole(rest, 8)) == to_json(made)
    assert going_on(to_json(params()), 0, 20)[0].extra_args is None


@pytest.mark.parametrize(
    "said", [2, [0, 4], [-1, 4], [4, 4], [2, 5], [10**12, 4], [True, 4], [2.0, 4], ["2", 4], [2], "24", None]
)
def test_what_cannot_be_the_beginning_of_an_answer_counts_as_none(said):
    assert generated(params(extra_args={GENERATED: said}), [1, 2, 3, 4]) == 0


def test_what_is_never_rebuilt():
    marked = {"extra_args": {GENERATED: [2, 4]}}
    assert generated(params(**marked), [1, 2, 3, 4]) == 2
    assert generated(params(**marked), None) == generated(None, [1, 2]) == 0
    for more in ({"structured_outputs": StructuredOutputsParams(regex="a+")}, {"prompt_logprobs": 1}):
        assert generated(params(**marked, **more), [1, 2, 3, 4]) == 0


def test_a_grammar_is_not_begun_again():
    document = to_json(params(structured_outputs=StructuredOutputsParams(regex="a+")))
    with pytest.raises(UnsupportedError, match="its grammar again"):
        going_on(document, 1, 20)
    assert going_on(document, 0, 20)[1] == ()
