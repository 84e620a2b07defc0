"""Kernels in Triton's caches, which are made up."""

import json
import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from thaw_vllm.engines.vllm import kernels, versions

TTIR = """#loc = loc("kernel.py":1:0)
module {
  tt.func public @k(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), %n: i32 loc("n"(#loc))) {
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "cache_root", lambda: tmp_path / "vllm")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def usual(home):
    return home / ".triton" / "cache"


def beside(home, name="thaw-x"):
    return home / "vllm/torch_compile_cache/torch_aot_compile" / name / "inductor_cache/triton/0"


def kernel(root, key, name="k", ttir=TTIR, **options):
    (root / key).mkdir(parents=True)
    (root / key / f"{name}.cubin").write_bytes(b"")
    (root / key / f"{name}.json").write_text(json.dumps({"hash": key, "name": name, "num_warps": 4} | options))
    (root / key / f"{name}.ttir").write_text(ttir)


def test_every_place_once(home, monkeypatch):
    kernel(usual(home), "A")
    kernel(beside(home), "B")
    before = kernels.listed()
    assert sorted(before.values()) == ["k", "k"] and kernels.compiled_since(before) == []
    kernel(usual(home), "C", "c")
    kernel(beside(home), "D", "d")
    (usual(home) / "empty").mkdir()
    os.symlink("thaw-x", beside(home).parents[2] / "own")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(beside(home, "own")))
    assert [one["name"] for one in kernels.compiled_since(before)] == ["c", "d"]


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({"name": "other"}, "there was none of that name"),
        ({"key": "A"}, "it was there, but Triton looked elsewhere"),
        ({"num_warps": 8}, "num_warps (4, here 8)"),
        ({"ptx": "8.7"}, "ptx (None, here 8.7)"),
        ({}, "its source is another, or Triton or its ptxas is"),
        (
            {"ttir": TTIR.replace(" {tt.divisibility = 16 : i32}", "").replace("kernel.py", "elsewhere.py")},
            "argument %x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} (here %x_ptr: !tt.ptr<f32>)",
        ),
        ({"ttir": TTIR.replace(', %n: i32 loc("n"(#loc))', "")}, "it had 2 arguments, here 1"),
        ({"ttir": ""}, "it had 2 arguments, here 0"),
    ],
)
def test_why_it_was_compiled(home, new, told):
    kernel(usual(home), "A")
    before = kernels.listed()
    new = dict(new)
    root = beside(home) if "key" in new else usual(home)
    kernel(root, new.pop("key", "B"), new.pop("name", "k"), **new)
    assert [one["why"] for one in kernels.compiled_since(before)] == [told]


def test_the_nearest_is_told(home):
    kernel(usual(home), "A", num_warps=8, num_stages=2)
    kernel(usual(home), "B", num_warps=4)
    before = kernels.listed()
    kernel(usual(home), "C", num_warps=2)
    assert kernels.compiled_since(before) == [{"name": "k", "why": "num_warps (4, here 2)"}]


def test_what_is_damaged_is_passed_over(home):
    kernel(usual(home), "A")
    (usual(home) / "A" / "k.json").write_text("{")
    (usual(home) / "A" / "k.ttir").unlink()
    before = kernels.listed()
    kernel(usual(home), "B")
    assert "num_warps (None, here 4)" in kernels.compiled_since(before)[0]["why"]
