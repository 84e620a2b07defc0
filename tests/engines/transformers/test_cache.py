import copy
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engines.transformers.resume import go_on, held

import thaw_vllm
from thaw_vllm.errors import (
    CorruptionError,
    ExistsError,
    FormatError,
    MismatchError,
    StorageError,
    ThawError,
    UnsupportedError,
    UsageError,
)
from thaw_vllm.kv.verify import verify
from thaw_vllm.weights.open import open_snapshot

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DynamicCache, StaticCache  # noqa: E402

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "format-v1" / "kv.thawkv"
PROMPT = [5, 17, 2, 88, 41, 3, 60, 9, 33, 71, 12]
ROOM = 32
OTHER = "tensors-blake3:" + "cd" * 32


def make(dtype=torch.float32, seed=0, **changes):
    """A small Llama with grouped queries."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | changes)).to(dtype).eval()


def load(directory, dtype):
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def run(model, cache=None, ids=PROMPT):
    """A cache of ``ids``, and the token that the model would say next."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
    return cache, int(logits[0, -1].argmax())


def static(model, room=ROOM):
    return StaticCache(config=model.config, max_cache_len=room)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def frozen(model, tmp_path_factory):
    """A file of ``model``'s cache; not to be changed."""
    path = tmp_path_factory.mktemp("cache") / "prompt.thawkv"
    thaw_vllm.freeze_cache(model, run(model)[0], PROMPT, path)
    return path


def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    cases, wanted = [], []
    for dtype in ("float32", "bfloat16"):
        make(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
        model = load(tmp_path / dtype, getattr(torch, dtype))
        for room in (None, ROOM):
            path = tmp_path / f"{dtype}-{room}.thawkv"
            cache, token = run(model, room and static(model))
            thaw_vllm.freeze_cache(model, cache, torch.tensor([PROMPT]), path)
            before = held(cache, len(PROMPT))
            wanted.append([type(cache).__name__, PROMPT, before, *go_on(model, copy.deepcopy(cache), token)])
            case = {"model": str(tmp_path / dtype), "dtype": dtype, "path": str(path), "room": room, "token": token}
            cases.append(case)
    command = [sys.executable, "-m", "tests.engines.transformers.resume"]
    ran = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == wanted


def test_static_to_dynamic_and_back(model, tmp_path):
    cache, token = run(model, static(model))
    thaw_vllm.freeze_cache(model, cache, PROMPT, tmp_path / "a.thawkv")
    second, ids = thaw_vllm.restore_cache(model, tmp_path / "a.thawkv")
    assert type(second) is DynamicCache and ids == PROMPT and second.get_seq_length() == len(PROMPT)
    thaw_vllm.freeze_cache(model, second, ids, tmp_path / "b.thawkv")
    assert (tmp_path / "a.thawkv").read_bytes() == (tmp_path / "b.thawkv").read_bytes()
    given = static(model)
    third, ids = thaw_vllm.restore_cache(model, tmp_path / "b.thawkv", cache=given)
    assert third is given and int(third.get_seq_length()) == len(PROMPT)
    assert held(third, ROOM) == held(cache, ROOM)
    assert held(second, len(PROMPT)) == held(cache, len(PROMPT))
    assert go_on(model, third, token) == go_on(model, cache, token)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_a_static_cache_that_was_used_is_filled_from_the_start(model, frozen, mode):
    fresh, _ = thaw_vllm.restore_cache(model, frozen, cache=static(model))
    used = static(model)
    with mode():
        model(torch.tensor([[1] * 20]), past_key_values=used, use_cache=True)
    thaw_vllm.restore_cache(model, frozen, cache=used)
    assert held(used, ROOM) == held(fresh, ROOM) and int(used.get_seq_length()) == len(PROMPT)


def test_generate_goes_on_from_it(model, tmp_path):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = DynamicCache(config=model.config)
    first = model.generate(torch.tensor([PROMPT]), past_key_values=cache, **options)
    with pytest.raises(UsageError, match=f"holds {len(PROMPT) + 5} tokens, token_ids are {len(PROMPT) + 6}"):
        thaw_vllm.freeze_cache(model, cache, first, tmp_path / "x.thawkv")
    thaw_vllm.freeze_cache(model, cache, first[:, :-1], tmp_path / "x.thawkv")
    restored, ids = thaw_vllm.restore_cache(model, tmp_path / "x.thawkv")
    assert ids == first[0, :-1].tolist()
    expected = model.generate(first, past_key_values=cache, **options)
    assert model.generate(first, past_key_values=restored, **options).tolist() == expected.tolist()


def test_what_the_file_says(model, frozen, tmp_path):
    with open_snapshot(frozen) as opened:
        identity, layout = opened.snapshot.header.identity, opened.snapshot.header.kv
    assert (identity.stage, identity.engine, identity.architecture) == ("kv", "transformers", "LlamaForCausalLM")
    assert (identity.dtype, identity.engine_version) == ("float32", transformers.__version__)
    assert identity.model == thaw_vllm.freeze_model(model, tmp_path / "weights.thaw").model
    assert layout is not None and layout.block_size == len(PROMPT) and len(layout.regions) == 6
    assert layout.regions[1].name == "layers.0.value" and layout.regions[1].shape == (1, 2, len(PROMPT), 8)
    assert "table" in verify(frozen).verified
    assert frozen.stat().st_mode & 0o777 == 0o600


def test_thaw_info_shows_it(frozen):
    start = "from thaw_vllm.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "info", str(frozen), "--json", "--show-tokens"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["identity"]["engine"] == "transformers" and found["prefixes"][0]["token_ids"] == PROMPT


def test_a_reloaded_model_is_the_same(model, frozen, tmp_path):
    model.save_pretrained(tmp_path)
    cache, _ = thaw_vllm.restore_cache(load(tmp_path, torch.float32), frozen)
    assert held(cache, len(PROMPT)) == held(run(model)[0], len(PROMPT))


def test_a_rounded_rotary_table_is_another_model(tmp_path):
    """All saved tensors, the config and the dtype agree, and what is computed next would not."""
    rounded = make(torch.bfloat16)
    rounded.save_pretrained(tmp_path)
    thaw_vllm.freeze_cache(rounded, run(rounded)[0], PROMPT, tmp_path / "x.thawkv")
    exact = load(tmp_path, torch.bfloat16)
    assert rounded.model.rotary_emb.inv_freq.dtype != exact.model.rotary_emb.inv_freq.dtype
    with pytest.raises(MismatchError, match="element type of a buffer differs"):
        thaw_vllm.restore_cache(exact, tmp_path / "x.thawkv")


def fine_tuned():
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fine_tuned, "holds a cache of the model tensors-blake3:"),
        (lambda: make(torch.bfloat16), "holds dtype 'float32', the engine has 'bfloat16'"),
        (lambda: make(rope_theta=20000.0), "holds config"),
        (lambda: make(num_hidden_layers=2), "holds config"),
        (lambda: make().model, "holds architecture 'LlamaForCausalLM'"),
    ],
    ids=["weights", "dtype", "rope", "layers", "architecture"],
)
def test_another_model_is_refused(frozen, other, message):
    other = other()
    given = static(other)
    with pytest.raises(MismatchError, match=message):
        thaw_vllm.restore_cache(other, frozen, cache=given)
    assert int(given.get_seq_length()) == 0


def test_a_model_id_that_is_given(model, tmp_path):
    path, cache = tmp_path / "x.thawkv", run(model)[0]
    with pytest.raises(UsageError, match="model_id"):
        thaw_vllm.freeze_cache(model, cache, PROMPT, path, model_id="mine")
    assert thaw_vllm.freeze_cache(model, cache, PROMPT, path, model_id=OTHER).model == OTHER
    assert thaw_vllm.restore_cache(model, path, model_id=OTHER)[1] == PROMPT
    with pytest.raises(MismatchError, match="pass the model_id that was given when freezing"):
        thaw_vllm.restore_cache(model, path)


def test_an_existing_file_is_kept(model, frozen, tmp_path):
    path = shutil.copy(frozen, tmp_path / "x.thawkv")
    cache, _ = run(model, ids=[1, 2])
    with pytest.raises(ExistsError):
        thaw_vllm.freeze_cache(model, cache, [1, 2], path)
    assert path.read_bytes() == frozen.read_bytes()
    thaw_vllm.freeze_cache(model, cache, [1, 2], path, force=True)
    assert thaw_vllm.restore_cache(model, path)[1] == [1, 2]


def test_any_flipped_byte_is_refused_or_means_nothing(model, frozen, tmp_path):
    """Wherever it lies, in the sections, the table, the pages or the padding; a cache that is given stays as it was."""
    data, wanted = frozen.read_bytes(), held(run(model)[0], len(PROMPT))
    path, refused = tmp_path / "x.thawkv", 0
    for at in range(0, len(data), 251):
        flipped = bytearray(data)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        given = static(model)
        try:
            cache, ids = thaw_vllm.restore_cache(model, path, cache=given)
        except FormatError:
            assert int(given.get_seq_length()) == 0
            refused += 1
        else:
            assert ids == PROMPT and held(cache, len(PROMPT)) == wanted
    assert refused > 20


def test_flipped_pages_are_refused(model, frozen, tmp_path):
    with open_snapshot(frozen) as opened:
        snapshot = opened.snapshot
        places = [snapshot.preamble.payload_at + chunk.stored_at for chunk in snapshot.chunks]
    for place in places:
        flipped = bytearray(frozen.read_bytes())
        flipped[place] ^= 1
        (tmp_path / "x.thawkv").write_bytes(flipped)
        with pytest.raises(CorruptionError, match="checksum"):
            thaw_vllm.restore_cache(model, tmp_path / "x.thawkv")


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_truncated(model, frozen, tmp_path, size):
    (tmp_path / "x.thawkv").write_bytes(frozen.read_bytes()[:size])
    with pytest.raises(FormatError):
        thaw_vllm.restore_cache(model, tmp_path / "x.thawkv")


def test_other_files_are_refused(model, tmp_path):
    thaw_vllm.freeze_model(model, tmp_path / "weights.thaw")
    with pytest.raises(MismatchError, match="holds weights, where KV blocks are needed"):
        thaw_vllm.restore_cache(model, tmp_path / "weights.thaw")
    with pytest.raises(MismatchError, match="of vllm, transformers needs"):
        thaw_vllm.restore_cache(model, GOLDEN)
    with pytest.raises(StorageError):
        thaw_vllm.restore_cache(model, tmp_path / "absent.thawkv")


def test_weights_are_not_restored_from_a_cache(model, frozen):
    with pytest.raises(MismatchError, match="KV blocks, not weights"):
        thaw_vllm.restore_model(model, frozen)


def refused(model, cache, ids, path, error, message):
    with pytest.raises(error, match=message):
        thaw_vllm.freeze_cache(model, cache, ids, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (PROMPT[:-1], UsageError, "holds 11 tokens, token_ids are 10"),
        ([*PROMPT, 1], UsageError, "holds 11 tokens, token_ids are 12"),
        ([], UsageError, "empty"),
        ([-1] * 11, UsageError, "from 0"),
        ([1 << 31] * 11, UsageError, "from 0"),
        ([1.5] * 11, UsageError, "integers"),
        ([PROMPT], UsageError, "integers"),
        ("hello world", UsageError, "integers"),
        (torch.tensor([PROMPT, PROMPT]), UnsupportedError, "2 sequences"),
        (torch.rand(11), UsageError, "integers"),
        (range(70000), UnsupportedError, "at most 65536"),
    ],
)
def test_token_ids_that_are_not_the_caches(model, tmp_path, ids, error, message):
    refused(model, run(model)[0], ids, tmp_path / "x.thawkv", error, message)


def test_caches_that_are_refused(model, tmp_path):
    path = tmp_path / "x.thawkv"
    two = DynamicCache(config=model.config)
    model(torch.tensor([PROMPT, PROMPT]), past_key_values=two)
    refused(model, two, PROMPT, path, UnsupportedError, "holds 2 sequences")
    windows = transformers.MistralConfig(
        sliding_window=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=97,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    sliding = transformers.MistralForCausalLM(windows).eval()
    refused(sliding, run(sliding)[0], PROMPT, path, UnsupportedError, "DynamicSlidingWindowLayer")
    refused(sliding, static(sliding), PROMPT, path, UnsupportedError, "StaticSlidingWindowLayer")
    both = transformers.EncoderDecoderCache(run(model)[0], run(model)[0])
    refused(model, both, PROMPT, path, UnsupportedError, "EncoderDecoderCache")
    refused(model, tuple(run(model)[0]), PROMPT, path, UnsupportedError, "tuple")
    refused(model, DynamicCache(), PROMPT, path, UsageError, "0 layers, the model's has 3")
    refused(model, DynamicCache(config=model.config), PROMPT, path, UsageError, "is empty")
    offloaded = run(model)[0]
    offloaded.offloading = True
    refused(model, offloaded, PROMPT, path, UnsupportedError, "offloaded")
    mixed = run(model)[0]
    mixed.layers[1].keys = mixed.layers[1].keys.bfloat16()
    refused(model, mixed, PROMPT, path, UnsupportedError, "autocast")
    shared = run(model)[0]
    shared.layers[1].keys = shared.layers[0].keys
    refused(model, shared, PROMPT, path, UnsupportedError, "share memory")


def test_models_that_are_refused(model, tmp_path):
    path, cache = tmp_path / "x.thawkv", run(model)[0]
    refused(torch.nn.Linear(2, 2), cache, PROMPT, path, UsageError, "not a model of transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 97}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    refused(t5, cache, PROMPT, path, UnsupportedError, "encoder-decoder")
    with torch.device("meta"):
        refused(make(), cache, PROMPT, path, UnsupportedError, "on one device")
    adapted = make()
    adapted._hf_peft_config_loaded = True
    refused(adapted, cache, PROMPT, path, UnsupportedError, "adapters")
    quantised = make(quantization_config={"quant_method": "fp8"})
    refused(quantised, cache, PROMPT, path, UnsupportedError, "quantised")


def test_static_caches_that_are_refused(model, frozen):
    for cache, message in (
        (DynamicCache(), "is a DynamicCache"),
        (static(model, 10), "room for 10 tokens"),
        (run(make(torch.bfloat16), static(model))[0], "is bfloat16"),
    ):
        with pytest.raises(UsageError, match=message):
            thaw_vllm.restore_cache(model, frozen, cache=cache)


def test_other_versions_of_transformers(model, frozen, monkeypatch, caplog):
    current = sys.modules["transformers"]  # which puts another in its place when it loads a model's code
    monkeypatch.setattr(current, "__version__", "7.1.0")
    with caplog.at_level(logging.WARNING):
        thaw_vllm.restore_cache(model, frozen)
    assert "this is 7.1.0" in caplog.text
    monkeypatch.delattr(current.cache_utils, "StaticLayer")
    for call in (lambda: thaw_vllm.restore_cache(model, frozen), lambda: thaw_vllm.freeze_cache(model, 0, [1], "x")):
        with pytest.raises(UnsupportedError, match=r"transformers 7\.1\.0 keeps caches"):
            call()


def test_errors_are_ours(model, frozen):
    with pytest.raises(ThawError):
        thaw_vllm.restore_cache(model, frozen.parent)
