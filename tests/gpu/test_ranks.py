"""Sets of rank files on several GPUs: other numbers of ranks, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_engine import ask, freeze
from tests.engines.vllm.test_reshard import compared, sizes

ARGS = {"gpu_memory_utilization": 0.1}


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("kind", ["biased", "moe"])
def test_another_number_of_ranks(kind: str, checkpoints: Callable, tmp_path: Path):
    """Every tensor of one rank's snapshot in an engine of two, and the other way round."""
    paths = [tmp_path / f"{ranks}.thaw" for ranks in (1, 2)]
    for ranks, path in enumerate(paths, 1):
        freeze(checkpoints(kind), path, **sizes(ranks), **ARGS)
    for ranks in (1, 2):
        for said in compared(tmp_path, checkpoints(kind), ranks, *paths):
            assert len(said) == ranks
            for one in said:
                assert one.get("differing") == [] and one["report"]["verified"] == "wordsum", one


def test_answers_with_graphs(checkpoints: Callable, tmp_path: Path):
    freeze(checkpoints("biased"), tmp_path / "1.thaw", **ARGS)
    args = ARGS | {"tensor_parallel_size": 2, "enforce_eager": False}
    default = ask(checkpoints("biased"), None, **args)
    thawed = ask(checkpoints("biased"), tmp_path / "1.thaw", **args)
    assert thawed["outputs"] == default["outputs"] and len(thawed["reports"]) == 2
