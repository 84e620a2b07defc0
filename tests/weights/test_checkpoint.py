import json
import os

import pytest
import torch
from safetensors.torch import save_file
from tests.weights.modules import bits

from thaw_vllm.errors import FormatError, StorageError, UsageError
from thaw_vllm.format.dtypes import ITEM_SIZE
from thaw_vllm.format.limits import MAX_FILE
from thaw_vllm.weights.checkpoint import (
    CARRIED_FILES,
    INDEX,
    NOT_WEIGHTS,
    SAFETENSORS_DTYPES,
    carried_files,
    has_weights,
    open_checkpoint,
    read_config,
    read_header,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def raw(header, data=b"", length=None):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_where_the_library_puts_them(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 4),
        "a": torch.arange(5, dtype=torch.int16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "nothing": torch.empty(0, 3),
        "half": torch.randn(4).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    found = open_checkpoint(tmp_path)
    assert found.files == ("model.safetensors",)
    assert {t.name: data[t.begin : t.end] for t in found.tensors} == {name: bits(t) for name, t in tensors.items()}
    assert {t.name: (t.dtype, t.shape) for t in found.tensors} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()
    }
    assert found.bytes == len(data)
    assert [t.begin for t in found.tensors] == sorted(t.begin for t in found.tensors)


def test_every_dtype_can_be_stored():
    assert set(SAFETENSORS_DTYPES.values()) <= set(ITEM_SIZE)


HOSTILE = {
    "nothing at all": b"",
    "seven bytes": bytes(7),
    "longer than the file": raw({}, length=3),
    "far longer": raw({}, length=2**63),
    "beyond the limit": raw({}, length=100_000_001),
    "not JSON": raw(b"{"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([]),
    "deep": raw(b'{"a":' * 50_000),
    "a name twice": raw(b'{"a": 1, "a": 2}'),
    "an entry that is a list": raw({"a": []}),
    "an unknown dtype": raw({"a": entry(dtype="F7")}, bytes(8)),
    "a dtype that is a number": raw({"a": entry(dtype=4)}, bytes(8)),
    "no shape": raw({"a": entry() | {"shape": None}}, bytes(8)),
    "a negative size": raw({"a": entry(shape=(-2,))}, bytes(8)),
    "a boolean size": raw({"a": entry(shape=(True, 2))}, bytes(8)),
    "a product that wraps": raw({"a": entry(shape=(2**32, 2**32, 2))}, bytes(8)),
    "too many dimensions": raw({"a": entry(shape=[1] * 65, offsets=(0, 4))}, bytes(8)),
    "offsets for another shape": raw({"a": entry(offsets=(0, 4))}, bytes(8)),
    "offsets backwards": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "a negative offset": raw({"a": entry(offsets=(-4, 4))}, bytes(8)),
    "one offset": raw({"a": entry(offsets=(8,))}, bytes(8)),
    "three offsets": raw({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "past the end": raw({"a": entry(offsets=(4, 12))}, bytes(8)),
    "far past the end": raw({"a": entry(shape=(2**50,), offsets=(0, 2**52))}, bytes(8)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(FormatError, match=r"'?model.safetensors"):
        read_header(path)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_file_without_room_for_a_length(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(bytes(7))
    with pytest.raises(FormatError, match=r"'m.safetensors' is too short to be a safetensors file"):
        open_checkpoint(tmp_path)


def test_sound_file_of_the_same_making_is_not(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry(), "__metadata__": {"x": "y"}}, bytes(8)))
    assert [t.name for t in open_checkpoint(tmp_path).tensors] == ["a"]


def test_shards_and_their_index(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "m-2.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors")
    with pytest.raises(FormatError, match=r"'a' stands in 'm-1.safetensors' and in 'old.safetensors'"):
        open_checkpoint(tmp_path)
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    found = open_checkpoint(tmp_path)
    assert found.files == ("m-1.safetensors", "m-2.safetensors")
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(StorageError, match=f"lacks 'm-2.safetensors', which its {INDEX} names"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "value", ["../m.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden", "x" * 256, 7, None, "m\0.safetensors"]
)
def test_index_names_files_beside_it(value, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": value}}))
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": []}'])
def test_index_that_is_none(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_the_consolidated_copy_beside_the_shards_is_left_out(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert open_checkpoint(tmp_path).files == ("model.safetensors",)
    (tmp_path / "model.safetensors").unlink()
    assert open_checkpoint(tmp_path).files == ("consolidated.safetensors",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_other_formats_are_files_without_tensors(name, tmp_path):
    (tmp_path / name).write_bytes(b"x" * 10)
    found = open_checkpoint(tmp_path)
    assert (found.files, found.tensors, found.bytes) == ((name,), (), 10)


def test_directory_without_weights(tmp_path):
    with pytest.raises(UsageError, match="holds no weight files"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="is not a model directory"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_training_leaves_is_no_weights(name, tmp_path):
    (tmp_path / name).write_bytes(b"x" * 10)
    assert not has_weights(tmp_path)
    with pytest.raises(UsageError, match="holds no weight files"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert has_weights(tmp_path) and open_checkpoint(tmp_path).files == ("pytorch_model.bin",)


def test_carried_files_are_the_known_names_alone(tmp_path, caplog):
    for name in ("config.json", "vocab.txt", "modeling_x.py", "notes.json", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "tokenizer.json").mkdir()
    with open(tmp_path / "merges.txt", "wb") as file:
        file.truncate(MAX_FILE + 1)
    assert carried_files(tmp_path) == [("config.json", b"config.json"), ("vocab.txt", b"vocab.txt")]
    assert [r.args[0].name for r in caplog.records] == ["merges.txt"]
    assert len(set(CARRIED_FILES)) == len(CARRIED_FILES)


def test_config(tmp_path):
    assert read_config(tmp_path) == {}
    path = tmp_path / "config.json"
    for text, expected in (('{"a": Infinity}', {"a": float("inf")}), ("[]", {}), ("7", {})):
        path.write_text(text)
        assert read_config(tmp_path) == expected
    for text in ("", "{", "[" * 100_000, "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(FormatError, match=r"config.json' is not JSON"):
            read_config(tmp_path)
    os.unlink(path)
    path.mkdir()
    assert read_config(tmp_path) == {}
