"""Engines in forks of a zygote on the GPU: the answers of engines that were started anew, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.zygote.running import until

from thaw_vllm.engines.vllm import fresh, start_report
from thaw_vllm.zygote import client, processes
from thaw_vllm.zygote.place import place
from thaw_vllm.zygote.start import start

PROMPTS = [list(range(5, 40)), list(range(100, 180))]
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A zygote of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_ZYGOTE_DIR", str(tmp_path_factory.mktemp("zygote")))
        os.chmod(os.environ["THAW_ZYGOTE_DIR"], 0o700)
        start(place(), imports=[], models=[], environment=ENVIRONMENT | fresh.READ_FROM_THE_LOG)
        yield os.environ["THAW_ZYGOTE_DIR"]
        client.ask(place(), "stop")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_answers_are_equal(eager: bool, ranks: int, directory: str, checkpoints: Callable, tmp_path: Path):
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    args: dict[str, Any] = {"max_model_len": 256, "enforce_eager": eager, "kv_cache_memory_bytes": 64 << 20}
    args |= {"gpu_memory_utilization": 0.1, "tensor_parallel_size": ranks}
    if not eager:
        args["compilation_config"] = {"cudagraph_capture_sizes": [1, 2]}
    asked: dict[str, Any] = {"model": str(checkpoints("untied")), "engine_args": args, "questions": PROMPTS}
    snapshot = tmp_path / "weights.thaw"
    fresh.run("freeze", snapshot=snapshot, **asked)
    anew = fresh.run("ask", snapshot=None, environment=ENVIRONMENT, **asked)
    reports = ENVIRONMENT | {"THAW_START_REPORT": str(tmp_path / "start")}
    forked = fresh.run("ask", snapshot=snapshot, environment=reports, zygote="default", **asked)
    assert forked["outputs"] == anew["outputs"]
    found = start_report.read(tmp_path / "start")
    assert not {"imports", "engine imports", "worker imports"} & set(found.seconds), found.waterfall()
    assert client.ask(place(), "status")["unsound"] is None
    until(lambda: not client.ask(place(), "status")["programs"], "its keeper ends after it")
    assert processes.below(client.ask(place(), "status")["pid"]) == []
