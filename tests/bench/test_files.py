import json

import pytest
import torch

from thaw_vllm.bench import files
from thaw_vllm.bench.llama import random, shape_for
from thaw_vllm.bench.process import ChildError, ask
from thaw_vllm.errors import SpaceError

SHAPE = shape_for(0.004)


def test_shards():
    assert files.shards({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6) == [["a", "b"], ["c"], ["d"]]


def test_safetensors_are_what_the_library_reads(tmp_path, monkeypatch):
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file
    monkeypatch.setattr(files, "SHARD", 1 << 20)
    monkeypatch.setattr(files, "PIECE", 10_000)
    monkeypatch.setattr(files.shards, "__defaults__", (1 << 20,))
    model = random(SHAPE, torch.device("cpu"))
    names = files.write_safetensors(model.tensors, tmp_path)
    assert len(names) > 2 and names[0].startswith("model-00001-of-0000")
    found = {}
    for name in names:
        found |= load_file(tmp_path / name)
    assert set(found) == set(model.tensors)
    assert all(torch.equal(found[n].view(torch.int16), t.view(torch.int16)) for n, t in model.tensors.items())


def test_made_once(tmp_path):
    folder = tmp_path / "folder"
    request = {"shape": vars(SHAPE), "device": "cpu", "folder": str(folder), "layouts": ["safetensors", "thaw"]}
    assert files.opened(folder, SHAPE, ["thaw"]) is None
    ask("make", request)
    made = files.opened(folder, SHAPE, ["thaw", "safetensors"])
    assert made is not None and made.bytes == SHAPE.bytes and len(made.digests) == len(SHAPE.tensors())
    assert [path.name for path in made.paths["thaw"]] == ["model.thaw"]
    assert files.opened(folder, shape_for(0.01), ["thaw"]) is None
    assert files.opened(folder, SHAPE, ["native"]) is None
    (folder / "model.thaw").unlink()
    assert files.opened(folder, SHAPE, ["safetensors"]) is None
    (folder / files.MANIFEST).write_text(json.dumps({"shape": 1}))
    assert files.opened(folder, SHAPE, ["safetensors"]) is None


def test_no_such_device(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    request = {"shape": vars(SHAPE), "device": "cuda", "folder": str(tmp_path / "x"), "layouts": ["thaw"]}
    with pytest.raises(ChildError, match="UsageError: torch finds no GPU"):
        ask("make", request)


def test_no_room(tmp_path):
    with pytest.raises(SpaceError, match="give another"):
        files.check_room(tmp_path, 10**18, "give another")
