"""``thaw info``, ``verify`` and their neighbours on files of KV blocks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.format import independent
from tests.kv.files import LAYOUT, tensors, write

from thaw_vllm import restore_model
from thaw_vllm.errors import MismatchError
from thaw_vllm.weights.open import open_snapshot

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "format-v1" / "kv.thawkv"
SALT = "tenant é"
IDS = [[11, 12, 13, 14, 21, 22, 23, 24], [11, 12, 13, 14, 0, 1, 2, 2**31 - 1], [11, 12, 13, 14]]


@pytest.fixture
def addresses():
    """Of the golden file's leaves, the longest first, by the second reader."""
    header, _, found, _ = independent.read(GOLDEN.read_bytes())
    return [independent.prefixes(header, found)[leaf] for leaf in (1, 2, 3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A model directory with a tokenizer of one word a token."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    directory = tmp_path_factory.mktemp("tokenizer")
    words = {"Hello": 11, "there": 12, "Alice\x1b[31m": 13, "!": 14} | {f"w{n}": n for n in range(11)}
    words |= {f"w{n}": n for n in range(15, 25)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


def test_text(thaw, addresses):
    ran = thaw("info", GOLDEN)
    assert ran.code == 0 and ran.err == ""
    above, prefixes, below = ran.out.split("\n\n")
    facts = [tuple(re.split(r"  +", line, maxsplit=1)) for line in above.splitlines()]
    assert facts[3:] == [
        ("stage", "kv of vllm 0.32.0"),
        ("architecture", "GoldenForCausalLM"),
        ("dtype", "bfloat16"),
        ("quantization", "none"),
        ("parallel", "tensor-parallel rank 0 of 1"),
        ("config", "cd" * 32),
        ("written by", "thaw 0.1.0"),
        ("block size", "4 tokens"),
        ("cache dtype", "bfloat16"),
        ("group", "FullAttentionSpec, 1 layer"),
        ("group", "SlidingWindowSpec, 1 layer, window of 8 tokens"),
        ("regions", "2, 48 bytes a block"),
        ("pages", "7 in each region, 336 bytes"),
        ("blocks", "4"),
        ("prefixes", "3, the longest of 8 tokens"),
    ]
    assert [re.split(r"  +", line.strip()) for line in prefixes.splitlines()] == [
        ["PREFIX", "TOKENS", "BLOCKS", "SALTED"],
        [addresses[0][:16], "8", "2", "no"],
        [addresses[1][:16], "8", "2", "no"],
        [addresses[2][:16], "4", "1", "yes"],
    ]
    assert "pages.layers.0.attn#1" in below
    assert "pages.layers" not in thaw("info", GOLDEN, "--no-tensors").out


def test_json(thaw, addresses):
    ran = thaw("info", GOLDEN, "--json")
    assert ran.code == 0 and ran.err == ""
    found = ran.document
    assert found["holds"] == "kv" and found["kv"] == json.loads(json.dumps(LAYOUT.to_json()))
    assert found["pages"] == {"slots": 7, "block": 48, "bytes": 336} and found["blocks"] == 4
    assert found["prefixes"] == [
        {"address": addresses[0], "tokens": 8, "blocks": 2, "salted": False},
        {"address": addresses[1], "tokens": 8, "blocks": 2, "salted": False},
        {"address": addresses[2], "tokens": 4, "blocks": 1, "salted": True},
    ]
    assert "holds" not in thaw("info", GOLDEN.with_name("views.thaw"), "--json").document


@pytest.mark.parametrize("options", [(), ("--json",), ("--no-tensors",)])
def test_prompts_and_salts_are_not_shown_unasked(thaw, options):
    ran = thaw("info", GOLDEN, *options)
    assert ran.code == 0 and "tenant" not in ran.out and not re.search(r"\b(2147483647|11,?\s+12)\b", ran.out)


def test_tokens(thaw):
    ran = thaw("info", GOLDEN, "--show-tokens", "--no-tensors")
    assert ran.code == 0
    assert re.findall(r"^token ids  (.*)$", ran.out, re.MULTILINE) == [" ".join(map(str, ids)) for ids in IDS]
    assert re.findall(r"^salt +(.*)$", ran.out, re.MULTILINE) == [SALT]
    found = thaw("info", GOLDEN, "--show-tokens", "--json").document["prefixes"]
    assert [(p["token_ids"], p["salt"]) for p in found] == list(zip(IDS, [None, None, SALT], strict=True))


def test_text_of_a_prompt(thaw, tokenizer):
    """Safe for a terminal, and nothing but the text."""
    ran = thaw("info", GOLDEN, "--show-text", "--tokenizer", tokenizer, "--no-tensors")
    assert ran.code == 0, ran.err
    texts = re.findall(r"^text +(.*)$", ran.out, re.MULTILINE)
    assert texts[0] == repr("Hello there Alice\x1b[31m ! w21 w22 w23 w24") and len(texts) == 3
    assert "\x1b" not in ran.out and "tenant" not in ran.out and "token ids" not in ran.out
    found = thaw("info", GOLDEN, "--show-text", "--tokenizer", tokenizer, "--json").document["prefixes"]
    assert found[2]["text"] == "Hello there Alice\x1b[31m !" and "token_ids" not in found[2]


def test_text_needs_a_tokenizer(thaw, tmp_path):
    for options in (("--show-text",), ("--tokenizer", tmp_path)):
        ran = thaw("info", GOLDEN, *options)
        assert ran.code == 2 and "belong together" in ran.err and ran.out == ""
    ran = thaw("info", GOLDEN, "--show-text", "--tokenizer", GOLDEN)
    assert ran.code == 2 and "is not a directory" in ran.err


def test_directory_without_a_tokenizer(thaw, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    ran = thaw("info", GOLDEN, "--show-text", "--tokenizer", tmp_path)
    assert ran.code == 2 and "has no tokenizer" in ran.err and ran.err.count("\n") == 1 and ran.out == ""


def test_without_transformers(spawn, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')")
    ran = spawn("info", GOLDEN, "--show-text", "--tokenizer", tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert ran.code == 7 and "pip install transformers" in ran.err and ran.err.count("\n") == 1


def test_weights_have_no_tokens(thaw, snapshot):
    ran = thaw("info", snapshot, "--show-tokens")
    assert ran.code == 2 and "holds weights" in ran.err


def test_another_rank(thaw, tmp_path):
    pages = {n: t for n, t in tensors().items() if n.startswith("pages.")}
    path = write(tmp_path / "kv.thawkv", pages, rank=1, size=2)
    ran = thaw("info", path)
    assert ran.code == 0 and re.search(r"^blocks +listed in the manifest", ran.out, re.MULTILINE)
    assert "PREFIX" not in ran.out
    found = thaw("info", path, "--json").document
    assert found["blocks"] is None and found["prefixes"] is None and found["pages"]["slots"] == 7
    ran = thaw("info", path, "--show-tokens")
    assert ran.code == 2 and "in the manifest" in ran.err
    ran = thaw("verify", path)
    assert ran.code == 0 and "form of the pages" in ran.out and "table of blocks" not in ran.out


def test_verify(thaw):
    ran = thaw("verify", GOLDEN, "--content")
    assert ran.code == 0 and "content id, form of the pages, table of blocks\n" in ran.out
    assert thaw("verify", GOLDEN, "--json").document["verified"] == ["sections", "chunks", "padding", "pages", "table"]
    assert thaw("verify", GOLDEN.with_name("views.thaw"), "--json").document["verified"][-1] == "padding"


def test_truncated(thaw, tmp_path):
    data = GOLDEN.read_bytes()
    for length in (0, 200, 300, 5000, len(data) - 1):
        (tmp_path / "kv.thawkv").write_bytes(data[:length])
        for command in ("info", "verify"):
            ran = thaw(command, tmp_path / "kv.thawkv")
            assert ran.code == 3 and ran.err.startswith("error: ") and ran.out == ""


def test_flipped(thaw, tmp_path):
    """A byte of the table ends both; one of the pages is for verify, which says where."""
    path = tmp_path / "kv.thawkv"
    with open_snapshot(GOLDEN) as opened:
        snapshot = opened.snapshot
    names = {t.storage: t.name for t in snapshot.index.tensors}
    for chunk in snapshot.chunks:
        data = bytearray(GOLDEN.read_bytes())
        data[snapshot.preamble.payload_at + chunk.stored_at] ^= 1
        path.write_bytes(data)
        ran = thaw("verify", path)
        assert ran.code == 3 and names[chunk.storage] in ran.err and str(path) in ran.err
        ran = thaw("info", path)
        assert ran.code == (0 if names[chunk.storage].startswith("pages.") else 3)


def test_sound_checksums_of_an_unsound_table(thaw, tmp_path):
    named = tensors()
    named["blocks.parents"] += 1
    path = write(tmp_path / "kv.thawkv", named)
    for command in ("info", "verify"):
        ran = thaw(command, path)
        assert ran.code == 3 and "does not come before it" in ran.err and str(path) in ran.err and ran.out == ""


def test_salts_cannot_steer_a_terminal(thaw, tmp_path):
    named = tensors()
    salt = b'{"3": {"salt": "\\u001b[31m"}}'
    named["blocks.extra"] = torch.tensor(list(salt), dtype=torch.uint8)
    ran = thaw("info", write(tmp_path / "kv.thawkv", named), "--show-tokens")
    assert ran.code == 3 and "salt must be a string" in ran.err and "\x1b" not in ran.err + ran.out
    salt = '{"3": {"salt": "\u202eab"}}'.encode()
    named["blocks.extra"] = torch.tensor(list(salt), dtype=torch.uint8)
    ran = thaw("info", write(tmp_path / "kv.thawkv", named), "--show-tokens")
    assert ran.code == 0 and "\u202e" not in ran.out and "\\u202eab" in ran.out


def test_needs_neither_torch_nor_numpy():
    code = f"""
import sys
from thaw_vllm.cli.main import main
assert main(["info", {str(GOLDEN)!r}, "--show-tokens"]) == 0
assert main(["verify", {str(GOLDEN)!r}]) == 0
print(sorted({{"torch", "numpy", "vllm", "safetensors", "transformers"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_no_weights_to_convert_or_restore(thaw, tmp_path):
    shutil.copy(GOLDEN, tmp_path)
    ran = thaw("convert", tmp_path / "kv.thawkv", tmp_path / "out")
    assert ran.code == MismatchError.exit_code and "holds KV blocks, not weights" in ran.err
    assert os.listdir(tmp_path) == ["kv.thawkv"]
    with pytest.raises(MismatchError, match="holds KV blocks, not weights"):
        restore_model(torch.nn.Linear(2, 2), GOLDEN)
