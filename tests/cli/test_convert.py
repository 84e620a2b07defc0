import json
import os

from thaw_vllm.weights import convert
from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.provenance import checkpoint_id


def test_there_and_back(thaw, checkpoint, tmp_path):
    model = checkpoint_id(open_checkpoint(checkpoint), cache=False)
    ran = thaw("convert", checkpoint, tmp_path / "m.thaw")
    assert ran.code == 0 and ran.err == "" and model in ran.out
    ran = thaw("convert", tmp_path / "m.thaw", tmp_path / "again")
    assert ran.code == 0 and ran.err == "" and "model.safetensors" in ran.out and "config.json" in ran.out
    assert checkpoint_id(open_checkpoint(tmp_path / "again"), cache=False) == model
    assert sorted(os.listdir(tmp_path / "again")) == ["config.json", "model.safetensors"]
    assert thaw("info", tmp_path / "m.thaw", "--json").document["identity"]["architecture"] == "Llama"


def test_json(thaw, checkpoint, tmp_path):
    there = thaw("convert", checkpoint, tmp_path / "m.thaw", "--json").document
    assert there["direction"] == "to-snapshot" and there["path"] == str(tmp_path / "m.thaw")
    back = thaw("convert", tmp_path / "m.thaw", tmp_path / "again", "--json").document
    assert back["direction"] == "to-checkpoint" and back["files"] == ["model.safetensors"]
    assert back["model"] == there["model"] and back["tensors"] == there["tensors"] == 2


def test_ties_are_mentioned(thaw, snapshot, tmp_path):
    ran = thaw("convert", snapshot, tmp_path / "out")
    assert ran.code == 0 and "safetensors has no ties; written on its own: head.weight\n" in ran.out


def test_shards(thaw, checkpoint, tmp_path, monkeypatch):
    assert thaw("convert", checkpoint, tmp_path / "m.thaw").code == 0
    original = convert.to_checkpoint
    monkeypatch.setattr(convert, "to_checkpoint", lambda *a, **k: original(*a, **k, shard_size=1))
    ran = thaw("convert", tmp_path / "m.thaw", tmp_path / "again")
    assert ran.code == 0 and "model-00002-of-00002.safetensors" in ran.out
    weight_map = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == {"a", "b"}
