"""Sets of rank files on several GPUs: every kind of rank, other numbers of ranks, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_engine import ask, freeze
from tests.engines.vllm.test_kv import THREE, engine, same
from tests.engines.vllm.test_ranks import (
    EXPERT,
    expect_equal,
    names,
    run,
    test_pipeline_stages,
    test_replicas_of_a_dense_model_thaw_the_same_set,
    thaw,
)
from tests.engines.vllm.test_reshard import compared, sizes

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.weights.open import open_snapshot

__all__ = ["test_pipeline_stages", "test_replicas_of_a_dense_model_thaw_the_same_set"]

ARGS: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 64 << 20}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "tensors": ("untied", {"tensor_parallel_size": 2}),
    "stages": ("untied", {"pipeline_parallel_size": 2}),
    "experts": ("moe", {"tensor_parallel_size": 2} | EXPERT),
}
"""By what the ranks share out."""
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2]}}


def routes_experts() -> bool:
    return hasattr(torch.ops._moe_C, "topk_softmax")


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
        for said in compared(tmp_path, checkpoints(kind), ranks, *paths, **ARGS):
            assert len(said) == ranks
            for one in said:
                assert one.get("differing") == [] and one["report"]["verified"] == "wordsum", one


def test_answers_with_graphs(checkpoints: Callable, tmp_path: Path):
    freeze(checkpoints("biased"), tmp_path / "1.thaw", **ARGS)
    args = ARGS | {"tensor_parallel_size": 2, "enforce_eager": False}
    default = ask(checkpoints("biased"), None, **args)
    thawed = ask(checkpoints("biased"), tmp_path / "1.thaw", **args)
    assert thawed["outputs"] == default["outputs"] and len(thawed["reports"]) == 2


@pytest.mark.parametrize("kind", list(ENGINES))
def test_whole_engines(kind: str, checkpoints: Callable, tmp_path: Path):
    """Weights and KV of both ranks, with graphs: tokens and log-probabilities, and every block of both.

    The engine that freezes is the first: whichever compiles the model chooses among reductions by their speed, and
    those after it take what it has compiled.
    """
    if kind == "experts" and not routes_experts():
        pytest.skip("this build of vLLM has no kernel that routes experts")
    name, kinds = ENGINES[kind]
    args = ARGS | GRAPHS | kinds | {"model": str(checkpoints(name)), "block_size": 16}
    weights, first, second = (tmp_path / file for file in ("w.thaw", "first.thawkv", "second.thawkv"))
    asked: dict[str, Any] = {"do": "ask", "prompts": THREE}
    engine(tmp_path, [asked], **args, **thaw(weights, mode="freeze"))
    default = engine(tmp_path, [asked, asked], **args)
    with open_snapshot(weights) as opened:
        assert len(opened.snapshot.header.ranks.members) == 1
    thawed = engine(tmp_path, [asked, asked, {"do": "freeze", "path": first}], **args, snapshot=str(weights))
    assert same(thawed[0], default[0]) and same(thawed[1], default[1])
    steps = [{"do": "freeze", "path": second}, asked]
    resumed = engine(tmp_path, steps, **args, snapshot=str(weights), kv_snapshot=str(first))
    assert all(answer["cached"] > 0 for answer in resumed[1]) and same(resumed[1], default[1])
    for rank in (0, 1):
        pages = pages_by_address(first, rank)
        assert pages and pages_by_address(second, rank) == pages


@pytest.mark.parametrize(("kind", "name"), [("dp", "dp1-pp0-tp0"), ("tp", "rank1")])
def test_ranks_that_share_experts(kind: str, name: str, checkpoints: Callable, tmp_path: Path):
    """Every tensor of two data- or tensor-parallel ranks, of which each holds half of the experts."""
    base, path = {"model": str(checkpoints("moe"))} | EXPERT, tmp_path / "w.thaw"
    loads = [base, base | thaw(path, mode="freeze"), base | thaw(path)]
    ranks = run(tmp_path / "run", loads, **{kind: 2})
    expect_equal(ranks, path)
    assert names(path) == [name]
    assert [(rank[2]["ep_rank"], rank[2]["ep_size"]) for rank in ranks] == [(0, 2), (1, 2)]
