"""Engines in forks of a zygote on the GPU: the answers of engines that were started anew, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.zygote.running import until

from thaw_vllm.engines.vllm import fresh, start_report
from thaw_vllm.zygote import client, processes
from thaw_vllm.zygote.place import Place

PROMPTS = [list(range(5, 40)), list(range(100, 180))]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_answers_are_equal(eager: bool, ranks: int, zygote: Place, checkpoints: Callable, tmp_path: Path):
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    args: dict[str, Any] = {"max_model_len": 256, "enforce_eager": eager, "kv_cache_memory_bytes": 64 << 20}
    args |= {"gpu_memory_utilization": 0.1, "tensor_parallel_size": ranks}
    if not eager:
        args["compilation_config"] = {"cudagraph_capture_sizes": [1, 2]}
    asked: dict[str, Any] = {"model": str(checkpoints("untied")), "engine_args": args, "questions": PROMPTS}
    snapshot = tmp_path / "weights.thaw"
    fresh.run("freeze", snapshot=snapshot, **asked)
    anew = fresh.run("ask", snapshot=None, **asked)
    reports = {"THAW_START_REPORT": str(tmp_path / "start")}
    forked = fresh.run("ask", snapshot=snapshot, environment=reports, zygote="default", **asked)
    assert forked["outputs"] == anew["outputs"]
    found = start_report.read(tmp_path / "start")
    assert not {"imports", "engine imports", "worker imports"} & set(found.seconds), found.waterfall()
    assert client.ask(zygote, "status")["unsound"] is None
    until(lambda: not client.ask(zygote, "status")["programs"], "its keeper ends after it")
    assert processes.below(client.ask(zygote, "status")["pid"]) == []
