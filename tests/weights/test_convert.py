import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from thaw_vllm import freeze_model, restore_model
from thaw_vllm.errors import (
    CorruptionError,
    FormatError,
    ReplacedError,
    UnsupportedError,
    UsageError,
)
from thaw_vllm.format.dtypes import ITEM_SIZE
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.weights import convert
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.checkpoint import SAFETENSORS_DTYPES, config_hash, open_checkpoint, read_header
from thaw_vllm.weights.convert import from_checkpoint, to_checkpoint
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.provenance import check_source, checkpoint_id
from thaw_vllm.weights.verify import verify

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": 64}


def write_safetensors(path, tensors, metadata=None):
    """A safetensors file by the published format: ``tensors`` are (name, safetensors dtype, shape, bytes)."""
    document, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, shape, data in tensors:
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors))


def every_dtype():
    """One tensor of every dtype that safetensors has, of random bits; an empty one; a scalar."""
    source = random.Random(5)
    found = []
    for number, (kind, dtype) in enumerate(SAFETENSORS_DTYPES.items()):
        shape = [3, 5 + number]
        data = source.randbytes(math.prod(shape) * ITEM_SIZE[dtype])
        found.append((f"layer.{kind}", kind, shape, bytes(b & 1 for b in data) if kind == "BOOL" else data))
    found += [("empty", "BF16", [4, 0], b""), ("scalar", "F32", [], source.randbytes(4))]
    return found


def contents(directory):
    """Name → dtype, shape and bytes of every tensor, over all files."""
    found = {}
    for tensor in open_checkpoint(directory).tensors:
        with (directory / tensor.file).open("rb") as file:
            file.seek(tensor.begin)
            found[tensor.name] = (tensor.dtype, tensor.shape, file.read(tensor.end - tensor.begin))
    return found


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards of every dtype, with the small files a model has."""
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = every_dtype()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_safetensors(directory / names[0], tensors[:7], {"format": "pt", "torchao_version": "0.9"})
    write_safetensors(directory / names[1], tensors[7:], {"format": "pt"})
    weight_map = {t[0]: names[i >= 7] for i, t in enumerate(tensors)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_bytes(b"{}")
    (directory / "added_tokens.json").write_bytes(b"")
    (directory / "README.md").write_text("not carried")
    return directory


def listing(directory):
    return sorted(p.name for p in directory.iterdir())


def test_round_trip(checkpoint, tmp_path):
    report = from_checkpoint(checkpoint, tmp_path / "model.thaw", chunk_size=4 * MIB)
    model = checkpoint_id(open_checkpoint(checkpoint), cache=False)
    assert report.model == model
    assert report.tensors == len(every_dtype())
    verify(tmp_path / "model.thaw", content=True)
    made = to_checkpoint(tmp_path / "model.thaw", tmp_path / "again")
    assert made.files == ("model.safetensors",) and made.model == model
    assert made.tensors == report.tensors and made.repeated == ()
    assert made.bytes == sum(len(data) for *_, data in every_dtype())
    assert contents(tmp_path / "again") == contents(checkpoint)
    assert checkpoint_id(open_checkpoint(tmp_path / "again"), cache=False) == model
    assert made.carried == ("config.json", "tokenizer.json", "added_tokens.json")
    assert listing(tmp_path / "again") == sorted([*made.files, *made.carried])
    for name in made.carried:
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes()
    again = from_checkpoint(tmp_path / "again", tmp_path / "again.thaw")
    assert again.model == model


def test_the_safetensors_library_reads_what_we_write(checkpoint, tmp_path):
    from_checkpoint(checkpoint, tmp_path / "model.thaw")
    to_checkpoint(tmp_path / "model.thaw", tmp_path / "again")
    ours = safetensors.load_file(tmp_path / "again" / "model.safetensors")
    theirs = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        theirs |= safetensors.load_file(file)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert tensor.numel() == 0 or torch.equal(bits(ours[name]), bits(tensor))
    with open_safetensors(tmp_path / "again" / "model.safetensors") as file:
        assert file.metadata() == {"format": "pt", "torchao_version": "0.9"}


def open_safetensors(path):
    from safetensors import safe_open

    return safe_open(path, "pt")


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_identity_and_source(checkpoint, tmp_path):
    from_checkpoint(checkpoint, tmp_path / "model.thaw")
    with open_snapshot(tmp_path / "model.thaw") as opened:
        header, index = opened.snapshot.header, opened.snapshot.index
    assert header.identity.stage == "checkpoint" and header.identity.engine is None
    assert header.identity.architecture == "LlamaForCausalLM"
    assert header.identity.dtype == "bfloat16" and header.identity.quantization is None
    assert header.identity.config == config_hash(CONFIG)
    assert header.metadata["model"] == "model"
    assert {t.kind for t in index.tensors} == {"tensor"}
    assert [f.name for f in index.files] == ["config.json", "tokenizer.json", "added_tokens.json"]
    check_source(header.source, header.identity.model, checkpoint, "model.thaw")
    assert (tmp_path / "model.thaw").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("config", "dtype", "quantization"),
    [
        ({}, None, None),
        ({"dtype": "float16"}, "float16", None),
        ({"torch_dtype": "torch.float32"}, "float32", None),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16", None),
        ({"quantization_config": {"quant_method": "awq"}, "dtype": {"a": 1}}, None, "awq"),
        ({"architectures": "Llama", "quantization_config": [], "dtype": 7}, None, None),
        ({"architectures": ["a\nb"], "dtype": "x" * 300}, None, None),
    ],
)
def test_identity_of_odd_configs(config, dtype, quantization, tmp_path):
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "model.safetensors", every_dtype())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")
    with open_snapshot(tmp_path / "m.thaw") as opened:
        identity = opened.snapshot.header.identity
    assert (identity.dtype, identity.quantization, identity.architecture) == (dtype, quantization, None)


def test_config_hash():
    assert config_hash({"a": 1, "dtype": "x", "transformers_version": "5"}) == config_hash({"a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": 1}, {}) == config_hash({"a": 1}) != config_hash({"a": 1}, {"b": 2})
    limits = json.loads('{"time_step_limit": [0.0, Infinity], "x": NaN, "y": {"z": -Infinity}}')
    assert config_hash(limits) == config_hash(limits) != config_hash({"time_step_limit": [0.0]})
    with pytest.raises(UnsupportedError, match="hf_overrides"):
        config_hash({}, lambda config: config)


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_shards(checkpoint, tmp_path, limit):
    from_checkpoint(checkpoint, tmp_path / "model.thaw")
    made = to_checkpoint(tmp_path / "model.thaw", tmp_path / "again", shard_size=limit)
    assert contents(tmp_path / "again") == contents(checkpoint)
    for number, name in enumerate(made.files, 1):
        assert name == (f"model-{number:05}-of-{len(made.files):05}.safetensors" if limit < 10**9 else name)
        raw, tensors = read_header(tmp_path / "again" / name)
        total = sum(t.end - t.begin for t in tensors)
        assert total <= limit or sum(t.end > t.begin for t in tensors) == 1
        assert len(raw) % 8 == 0
        assert all(t.begin % ITEM_SIZE[t.dtype] == 0 for t in tensors)
    index = tmp_path / "again" / "model.safetensors.index.json"
    if len(made.files) == 1:
        assert made.files == ("model.safetensors",) and not index.exists()
    else:
        document = json.loads(index.read_text())
        assert document["metadata"]["total_size"] == made.bytes
        assert set(document["weight_map"].values()) == set(made.files)
        assert set(document["weight_map"]) == set(contents(checkpoint))


def test_many_chunks(tmp_path):
    """Tensors that begin and end anywhere in a file, of several chunks each."""
    (tmp_path / "m").mkdir()
    source = random.Random(9)
    tensors = [(f"t{i}", "U8", [n], source.randbytes(n)) for i, n in enumerate([1, 9 * MIB + 7, 4 * MIB, 3, 8 * MIB])]
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    seen = []
    from_checkpoint(tmp_path / "m", tmp_path / "m.thaw", chunk_size=4 * MIB, workers=3)
    to_checkpoint(tmp_path / "m.thaw", tmp_path / "n", workers=3, progress=lambda *done: seen.append(done))
    assert contents(tmp_path / "n") == contents(tmp_path / "m")
    total = sum(len(data) for *_, data in tensors)
    assert seen[-1] == (total, total) and seen == sorted(seen)


class Odd(torch.nn.Module):
    """Ties, views, repeated, transposed and channels-last parameters, a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.transposed = torch.nn.Parameter(torch.randn(6, 4).t())
        self.conv = torch.nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
        self.repeated = torch.nn.Parameter(torch.randn(3, 1).expand(3, 4))
        self.register_buffer("whole", torch.arange(24).reshape(4, 6))
        self.register_buffer("part", self.whole[1:3])
        self.register_buffer("turned", self.whole.t())
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("none", torch.empty(0, 2))


@pytest.mark.parametrize("block", [16, 1 << 24])
def test_module_with_ties_and_strides(tmp_path, monkeypatch, block):
    monkeypatch.setattr(convert, "_BLOCK", block)
    model = Odd()
    frozen = freeze_model(model, tmp_path / "odd.thaw")
    made = to_checkpoint(tmp_path / "odd.thaw", tmp_path / "odd")
    assert set(made.repeated) == {"head.weight", "part", "turned"}
    loaded = safetensors.load_file(tmp_path / "odd" / "model.safetensors")
    wanted = model.state_dict()
    assert set(loaded) == set(wanted)
    for name, tensor in wanted.items():
        assert loaded[name].is_contiguous() and loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor)), name
    assert checkpoint_id(open_checkpoint(tmp_path / "odd"), cache=False) == frozen.model == made.model


def test_converted_snapshot_thaws_into_a_module(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    (tmp_path / "m").mkdir()
    safetensors.save_file(model.state_dict(), tmp_path / "m" / "model.safetensors")
    report = from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    restore_model(other, tmp_path / "m.thaw")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert freeze_model(model, tmp_path / "n.thaw").model == report.model


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_dtype_that_safetensors_lacks(dtype, tmp_path):
    model = torch.nn.Module()
    model.register_buffer("phases", torch.zeros(3, dtype=dtype))
    freeze_model(model, tmp_path / "m.thaw")
    with pytest.raises(UnsupportedError, match=r"'phases' as complex.*safetensors has no name for"):
        to_checkpoint(tmp_path / "m.thaw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def snapshot_of(path, tensors, identity, files=()):
    captured = capture([(name, "tensor", tensor) for name, tensor in tensors], files)
    write_snapshot(path, Header(identity=identity), captured, FreezeOptions())


def test_shape_that_safetensors_cannot_count(tmp_path):
    """Empty, but the library multiplies from the left and stops where the product is beyond 64 bits."""
    snapshot_of(tmp_path / "m.thaw", [("vast", torch.ones(0).reshape(1 << 40, 1 << 20, 0))], Identity("checkpoint"))
    with pytest.raises(UnsupportedError, match=r"'vast' has the shape .*cannot count"):
        to_checkpoint(tmp_path / "m.thaw", tmp_path / "out")


def test_notes_beyond_the_limits_of_a_header(checkpoint, tmp_path):
    path = checkpoint / "model-00002-of-00002.safetensors"
    write_safetensors(path, every_dtype()[7:], {"calibration": "x" * (17 << 20)})
    with pytest.raises(UnsupportedError, match=r"a snapshot cannot hold this: too large .* header 178\d+ of 16777216"):
        from_checkpoint(checkpoint, tmp_path / "m.thaw")
    assert listing(tmp_path) == ["model"]


def test_name_that_is_not_unicode(checkpoint, tmp_path):
    odd = checkpoint.rename(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    from_checkpoint(odd, tmp_path / "m.thaw")
    with open_snapshot(tmp_path / "m.thaw") as opened:
        assert opened.snapshot.header.metadata["model"] == "m\\xff"


def test_without_tensors(tmp_path):
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "model.safetensors", [])
    report = from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")
    assert checkpoint_id(open_checkpoint(tmp_path / "m"), cache=False) == report.model


def test_raw_stage(tmp_path):
    snapshot_of(tmp_path / "raw.thaw", [("w", torch.ones(2))], Identity(stage="raw", engine="vllm"))
    with pytest.raises(UnsupportedError, match=r"'raw' stage of vllm.*Convert the checkpoint it was frozen from"):
        to_checkpoint(tmp_path / "raw.thaw", tmp_path / "out")
    assert listing(tmp_path) == ["raw.thaw"]


def test_reserved_name(tmp_path):
    snapshot_of(tmp_path / "m.thaw", [("__metadata__", torch.ones(2))], Identity(stage="checkpoint"))
    with pytest.raises(UnsupportedError, match="__metadata__"):
        to_checkpoint(tmp_path / "m.thaw", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "notes.txt"])
def test_carried_file_that_no_checkpoint_has(name, tmp_path):
    identity = Identity(stage="checkpoint")
    snapshot_of(tmp_path / "m.thaw", [("w", torch.ones(2))], identity, [(name, b"surprise")])
    with pytest.raises(UnsupportedError, match=name):
        to_checkpoint(tmp_path / "m.thaw", tmp_path / "out")
    assert listing(tmp_path) == ["m.thaw"]


def test_damaged_snapshot_writes_nothing(checkpoint, tmp_path):
    from_checkpoint(checkpoint, tmp_path / "model.thaw")
    with open_snapshot(tmp_path / "model.thaw") as opened:
        place = opened.snapshot.preamble.payload_at + opened.snapshot.chunks[3].stored_at
    with (tmp_path / "model.thaw").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptionError, match="is damaged"):
        to_checkpoint(tmp_path / "model.thaw", tmp_path / "out")
    assert listing(tmp_path) == ["model", "model.thaw"]


def test_checkpoint_that_changes_meanwhile(checkpoint, tmp_path):
    def touch(*done):
        os.utime(checkpoint / "model-00001-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(ReplacedError, match="00001-of-00002"):
        from_checkpoint(checkpoint, tmp_path / "model.thaw", progress=touch)
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("when", ["opened", "sampled", "read"])
def test_checkpoint_that_is_replaced_meanwhile(when, tmp_path, monkeypatch):
    """The new file has the same names at other offsets."""
    directory, other = tmp_path / "m", tmp_path / "other"
    directory.mkdir()
    tensors = [("a", "U8", [4], b"1111"), ("b", "U8", [4], b"2222")]
    write_safetensors(directory / "model.safetensors", tensors)
    write_safetensors(other, tensors[::-1])

    def replacing(real):
        def call(*arguments):
            answer = real(*arguments)
            if other.exists():
                other.rename(directory / "model.safetensors")
            return answer

        return call

    if when != "read":
        name = "open_checkpoint" if when == "opened" else "source_record"
        monkeypatch.setattr(convert, name, replacing(getattr(convert, name)))
    with pytest.raises(
        ReplacedError, match=r"model\.safetensors' was replaced .*while it was being read; run it again"
    ):
        from_checkpoint(directory, tmp_path / "m.thaw", progress=replacing(lambda *_: None))
    assert listing(tmp_path) == ["m"]


def test_other_formats(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*save_pretrained"):
        from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")


def test_no_checkpoint(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="no weight files"):
        from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")
    with pytest.raises(UsageError, match="not a model directory"):
        from_checkpoint(tmp_path / "n", tmp_path / "m.thaw")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(FormatError):
        from_checkpoint(tmp_path / "m", tmp_path / "m.thaw")
    assert listing(tmp_path) == ["m"]


def test_bad_options(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="chunk_size"):
        from_checkpoint(checkpoint, tmp_path / "model.thaw", chunk_size=5)
    for mode in (-1, 0o1600):
        with pytest.raises(UsageError, match="permission bits"):
            from_checkpoint(checkpoint, tmp_path / "model.thaw", mode=mode)
    from_checkpoint(checkpoint, tmp_path / "model.thaw")
    with pytest.raises(UsageError, match="shard_size"):
        to_checkpoint(tmp_path / "model.thaw", tmp_path / "out", shard_size=0)


def test_memory_is_a_few_chunks(tmp_path):
    """A model of 512 MiB there and back, with the process's memory never growing by a quarter of it."""
    (tmp_path / "m").mkdir()
    size = 512 * MIB
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "m" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    code = """
import resource, sys
from thaw_vllm.weights.convert import from_checkpoint, to_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from_checkpoint("m", "m.thaw", workers=4)
to_checkpoint("m.thaw", "n", workers=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 128 * 1024


def test_target_that_is_the_source(tmp_path):
    safetensors.save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="file of the checkpoint itself"):
        from_checkpoint(tmp_path, tmp_path / "model.safetensors", force=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before
