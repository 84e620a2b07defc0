import json

import pytest

from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.provenance import checkpoint_id


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("THAW_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "thaw" / "ids"


def test_checkpoint(thaw, checkpoint, cache):
    wanted = checkpoint_id(open_checkpoint(checkpoint), cache=False)
    ran = thaw("id", checkpoint)
    assert (ran.code, ran.out, ran.err) == (0, f"model  {wanted}\n", "")
    assert thaw("id", checkpoint, "--json").document == {"path": str(checkpoint), "model": wanted}
    (remembered,) = cache.iterdir()
    document = json.loads(remembered.read_text())
    remembered.write_text(json.dumps(document | {"id": "tensors-blake3:" + "0" * 64}))
    assert "0" * 64 in thaw("id", checkpoint).out
    assert wanted in thaw("id", checkpoint, "--no-cache").out


def test_without_cache_nothing_is_remembered(thaw, checkpoint, cache):
    assert thaw("id", checkpoint, "--no-cache").code == 0
    assert not cache.exists()


def test_snapshot(thaw, checkpoint, tmp_path):
    thaw("convert", checkpoint, tmp_path / "m.thaw")
    ran = thaw("id", tmp_path / "m.thaw", "--json")
    assert ran.document["model"] == thaw("id", checkpoint, "--json").document["model"]
    assert len(ran.document["content"]) == 64
    assert thaw("id", tmp_path / "m.thaw").out.count("\n") == 2


def test_directory_without_weights(thaw, tmp_path):
    ran = thaw("id", tmp_path)
    assert ran.code == 2 and "no weight files" in ran.err
