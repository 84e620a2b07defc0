"""Requests that begin with an answer's first tokens: in vLLM's engine core and in its front end, without an engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.v1.engine.detokenizer as detokenizers
from tests.engines.vllm.test_kv import LONG
from tests.engines.vllm.test_kv import engine as run_engine
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.sessions.sampling import GENERATED, generated, whole

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plugin does it; taken back afterwards."""
    monkeypatch.setattr(EngineCore, "preprocess_add_request", vars(EngineCore)["preprocess_add_request"])
    kind = detokenizers.IncrementalDetokenizer
    monkeypatch.setattr(kind, "from_new_request", vars(kind)["from_new_request"])
    for _ in range(2):
        versions.rebuild_requests(generated, whole)
        versions.prime_detokenizers(generated)


def request(tokens: list[int], **values: Any) -> EngineCoreRequest:
    params = SamplingParams(**values)
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def core(v2: bool = True, drafts: Any = None) -> Any:
    found = EngineCore.__new__(EngineCore)
    found.scheduler = SimpleNamespace(use_v2_model_runner=v2)
    found.vllm_config = SimpleNamespace(speculative_config=drafts)
    found.mm_receiver_cache = None
    found.request_block_hasher = lambda one: [b"block"] * (one.num_tokens // 4 - len(one.block_hashes))
    return found


class TestCore:
    def test_it_begins_with_what_was_generated(self):
        asked = request([*range(10)], max_tokens=5, min_tokens=2, seed=3, extra_args={GENERATED: [4, 10], "own": 1})
        made, _ = core().preprocess_add_request(asked)
        assert (made.prompt_token_ids, list(made.output_token_ids)) == ([*range(6)], [6, 7, 8, 9])
        assert (made.num_prompt_tokens, made.num_tokens, made.max_tokens) == (10, 10, 9), "all are to be prefilled"
        assert made.take_prefill_stats() is not None and made.num_prompt_tokens == 6
        assert (made.sampling_params.max_tokens, made.sampling_params.min_tokens) == (9, 6)
        assert made.sampling_params.extra_args == {"own": 1} and made.sampling_params.seed == 3
        assert len(made.block_hashes) == 2, "of the whole"
        assert asked.prompt_token_ids == [*range(10)] and asked.sampling_params.max_tokens == 5, "the front end's own"

    @pytest.mark.parametrize("engine", [{"v2": False}, {"drafts": object()}])
    def test_engines_that_do_not(self, engine: dict[str, Any]):
        made, _ = core(**engine).preprocess_add_request(request([*range(10)], extra_args={GENERATED: [4, 10]}))
        assert made.num_prompt_tokens == 10 and len(made.output_token_ids) == 0

    def test_other_requests(self):
        for extra in ({}, {"own": 1}, {GENERATED: [10, 10]}, {GENERATED: [4, 9]}):
            made, _ = core().preprocess_add_request(request([*range(10)], max_tokens=5, extra_args=extra))
            assert (made.num_prompt_tokens, made.max_tokens) == (10, 5)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_what_the_scheduler_hands_over(checkpoints: Callable, tmp_path: Path):
    """More of it is cached than its prompt has."""
    steps = [{"do": "ask", "prompts": [LONG], "max_tokens": 1}, {"do": "schedule", "tokens": LONG, "generated": 250}]
    inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    _, made = run_engine(tmp_path, steps, inside, model=str(checkpoints("tied")))
    assert (made["prompt"], made["prefill"]) == (LONG[:150], LONG)
    assert (made["computed"], made["scheduled"], made["max_tokens"]) == (384, 16, 260)
    assert made["stats"] == [400, 384]


class TestFront:
    """Against the detokenizer of the answer that was not interrupted, token by token."""

    @pytest.mark.parametrize("kind", ["FastIncrementalDetokenizer", "SlowIncrementalDetokenizer"])
    def test_texts_and_stop_strings(self, kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
        rng = random.Random(5)
        real = getattr(detokenizers, kind)
        monkeypatch.setattr(detokenizers, "FastIncrementalDetokenizer", real)
        text = "Grüße aus 北京, dear reader: naïve 🦊🦊 foxes jump — twice — over the lazy dog. END of it."
        answer = tokenizer.encode(text)
        prompt = tokenizer.encode("A question?")
        crossed = 0
        for number in range(200):
            at = rng.randrange(len(text) - 6)
            stop = [] if number % 4 == 0 else [text[at : at + rng.randrange(1, 6)]]
            values = {"max_tokens": 200, "stop": stop, "include_stop_str_in_output": bool(number % 3)}
            plain = detokenizers.IncrementalDetokenizer.from_new_request(tokenizer, request(prompt, **values))
            expected = [(plain.update([token], False), plain.get_next_output_text(False, True)) for token in answer]
            ended = next((index for index, (found, _) in enumerate(expected) if found), len(answer))
            cut = ended - rng.randrange(3) if stop else rng.randrange(1, len(answer))
            if not 0 < cut < len(answer):
                continue
            rest = request(prompt + answer[:cut], **values, extra_args={GENERATED: [cut, len(prompt) + cut]})
            made = detokenizers.IncrementalDetokenizer.from_new_request(tokenizer, rest)
            assert type(made) is real and made.output_token_ids == []
            plain = detokenizers.IncrementalDetokenizer.from_new_request(tokenizer, request(prompt, **values))
            plain.update(answer[:cut], False)
            before = plain.output_text
            streamed = ""
            for count, token in enumerate(answer[cut : ended + 1], 1):
                found = made.update([token], False)
                assert found == plain.update([token], False), (number, cut, stop)
                streamed += made.get_next_output_text(found is not None, True)
                assert made.output_token_ids == answer[cut : cut + count]
            assert plain.output_text[len(before) :] == made.get_next_output_text(True, False)
            assert streamed == made.get_next_output_text(True, False) or stop
            crossed += bool(stop) and ended < len(answer) and len(plain.output_text) < len(before) + len(stop[0])
        assert crossed > 5, "stop strings that began before the cut"

    def test_no_tokenizer(self):
        made = detokenizers.IncrementalDetokenizer.from_new_request(
            None, request([1, 2, 3], extra_args={GENERATED: [1, 3]})
        )
        made.update([4], False)
        assert made.output_token_ids == [4]

    def test_min_tokens_count_what_was_generated(self, tokenizer: Any):
        answer = tokenizer.encode(" a b a b a b")
        asked = request([1, *answer[:2]], stop=["b"], min_tokens=2, extra_args={GENERATED: [2, 3]})
        made = detokenizers.IncrementalDetokenizer.from_new_request(tokenizer, asked)
        assert [made.update([token], False) for token in answer[2:]] == [None, None, None, "b"]
