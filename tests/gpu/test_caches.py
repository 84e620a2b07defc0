"""Caches that travel, on the GPU: packed in one environment, and nothing compiled again in another."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_caches import packed_and_moved

ARGS = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20, "enforce_eager": False}
ARGS |= {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}


def elsewhere(directory: Path) -> str:
    """PYTHONPATH with vLLM's packages under another path, where they lie apart from Python's own."""
    home = {}
    for name in ("vllm", "torch"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        home[name] = Path(spec.origin).parent.parent
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if home["vllm"] != home["torch"] and str(home["vllm"]) in found:
        shutil.copytree(home["vllm"], directory, copy_function=os.link, symlinks=True)
        found = [str(directory) if path == str(home["vllm"]) else path for path in found]
    return os.pathsep.join(found)


def test_nothing_is_compiled_again(checkpoints: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another model directory, another home, and vLLM itself under another path."""

    def more() -> dict[str, str]:
        return {"PYTHONPATH": elsewhere(tmp_path / "site")}

    done, answer, home = packed_and_moved(checkpoints("tied"), tmp_path, monkeypatch, ARGS, more)
    assert done.compiled == 1 and done.answer is not None
    assert done.answer["compiled"][0]["counts"]["aot_compiles"] == 1
    (found,) = answer["compiled"]
    assert [one["state"] for one in found["parts"]] == ["found"], found
    assert found["counts"]["aot_artifacts_loaded"] == 1 and found["counts"]["aot_compiles"] == 0
    assert found["counts"]["inductor_compiles"] == found["counts"]["backend_compilations"] == 0
    assert found["kernels"] == []
    packed = {Path(member.path).name for member in done.manifest.members}
    assert {path.name for path in home.rglob("*.cubin")} <= packed
    assert [one["tokens"] for one in answer["outputs"]] == [one["tokens"] for one in done.answer["outputs"]]
