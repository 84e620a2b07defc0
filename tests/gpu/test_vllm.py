"""vLLM on the GPU: every tensor equal, in the loader and in running engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thaw_vllm.engines.vllm import fresh
from thaw_vllm.errors import UsageError
from thaw_vllm.weights.open import open_snapshot

pytest.importorskip("vllm", reason="vLLM is not installed")

PROMPTS = [list(range(5, 40)), list(range(100, 180))]
ARGS: dict[str, Any] = {"max_model_len": 256, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 64 << 20}


@pytest.mark.parametrize("kind", ["untied", "tied", "tied-with-lm-head", "fp16", "mixed-dtypes"])
def test_every_tensor_is_equal(kind: str, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path):
    directory, snapshot = checkpoints(kind), tmp_path / "weights.thaw"
    default = load(directory)
    frozen = load(directory, **thaw_args(snapshot, mode="freeze"))
    thawed = load(directory, **thaw_args(snapshot))
    assert default.raw
    assert frozen.raw == default.raw
    assert thawed.raw == default.raw
    assert thawed.processed() == default.processed()


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_tokens_are_equal_in_fresh_processes(eager: bool, checkpoints: Callable, tmp_path: Path):
    directory, snapshot = str(checkpoints("untied")), tmp_path / "weights.thaw"
    args: dict[str, Any] = ARGS | {"enforce_eager": eager}
    if not eager:
        args["compilation_config"] = {"cudagraph_capture_sizes": [1, 2]}
    fresh.run("freeze", model=directory, snapshot=snapshot, engine_args=args)
    default = fresh.run("ask", model=directory, snapshot=None, engine_args=args, questions=PROMPTS)
    thawed = fresh.run("ask", model=directory, snapshot=snapshot, engine_args=args, questions=PROMPTS)
    assert thawed["outputs"] == default["outputs"]


def test_a_running_engine_freezes_to_the_same_content(
    checkpoints: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On CUDA post-processing of unquantised dense models is the identity, so both ways give the same file content."""
    # Making the checkpoint starts OpenMP's threads, and an engine core forked after that would wait for them for ever.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM

    import thaw_vllm

    directory = str(checkpoints("untied"))
    args: dict[str, Any] = ARGS | {"enforce_eager": True}
    fresh.run("freeze", model=directory, snapshot=tmp_path / "loading.thaw", engine_args=args)
    llm = LLM(directory, enable_sleep_mode=True, **args)
    thaw_vllm.freeze_model_tp(llm, tmp_path / "running.thaw")
    llm.sleep(level=1)
    with pytest.raises(UsageError, match="asleep"):
        thaw_vllm.freeze_model_tp(llm, tmp_path / "asleep.thaw")
    assert not (tmp_path / "asleep.thaw").exists()
    llm.wake_up()
    thaw_vllm.freeze_model_tp(llm, tmp_path / "awake.thaw")
    found = []
    for name in ("loading.thaw", "running.thaw", "awake.thaw"):
        with open_snapshot(tmp_path / name) as opened:
            found.append(opened.snapshot.header.content)
    assert found[0] == found[1] == found[2]
