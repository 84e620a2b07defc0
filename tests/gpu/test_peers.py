"""Weights from one process's GPU memory to another's, and from one reader to several GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
ARGS: dict[str, Any] = {
    "max_model_len": 512,
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 64 << 20,
}


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("gigabytes", ["0.05", "2"])
def test_on_one_gpu(gigabytes: str):
    found = run("peers.py", "--gb", gigabytes, "--from", "0", "--to", "0")
    assert found["equal"] and found["verified"] == "wordsum" and found["lender_ended"] == 0
    assert found["route"].startswith("peer: cuda:0 of process ") and found["route"].endswith(" → cuda:0")
    assert " over " not in found["route"]


@pytest.mark.parametrize("gigabytes", ["0.05", "2"])
def test_over_tcp(gigabytes: str):
    found = run("peers.py", "--gb", gigabytes, "--from", "0", "--to", "0", "--tcp")
    assert found["equal"] and found["verified"] == "wordsum" and found["lender_ended"] == 0
    assert found["route"].startswith("peer: 127.0.0.1:") and found["route"].endswith(" over TCP → cuda:0")


@two_gpus
@pytest.mark.parametrize("gigabytes", ["0.05", "2"])
def test_from_one_gpu_to_another(gigabytes: str):
    found = run("peers.py", "--gb", gigabytes)
    assert found["equal"] and found["verified"] == "wordsum" and found["lender_ended"] == 0
    assert not found["context_on_the_lenders_gpu"]
    assert found["route"].startswith("peer: cuda:0 of process ") and found["route"].endswith(" → cuda:1")
    assert " over " in found["route"]


@two_gpus
def test_one_read_for_two_gpus():
    found = run("fan_out.py", "--gb", "2", "--rounds", "2")
    assert found["equal"] and found["verified"] == ["wordsum"] * 2
    assert found["routes"][0].endswith("and on to 1 ranks by nccl")
    assert found["routes"][1] == "rank 0 by nccl → cuda:1"


@pytest.mark.parametrize(
    "mode", [{"enforce_eager": True}, {"cudagraph_capture_sizes": [1, 2, 4]}], ids=["eager", "graphs"]
)
def test_engines(mode: dict[str, Any], checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path):
    """As on the CPU (tests/engines/vllm/test_offering.py), where nothing is left out."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.engines.vllm.test_kv import run_script
    from tests.engines.vllm.test_offering import judge
    from tests.engines.vllm.test_swap import environment, fine_tuned

    made = fine_tuned(checkpoints("untied"), tmp_path)
    for which in made.values():
        load(which, **thaw_args(which.with_suffix(".thaw"), mode="freeze"))
    first, second = (str(made[name].with_suffix(".thaw")) for name in ("first", "second"))
    asked = {"model": str(made["first"]), "snapshot": first, "second": second, "engine_args": ARGS | mode}
    more = environment() | {"THAW_STATE_DIR": str(tmp_path / "state")}
    found = run_script("peer_engines.py", tmp_path, asked, more)
    judge(found, "cuda:{}", "cuda:{}")
    assert found["reports"][1][0]["verified"] == "wordsum"
