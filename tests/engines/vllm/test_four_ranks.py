"""Four ranks: every tensor, snapshots of four in worlds of two and of two in worlds of four, and whole engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.test_kv import THREE, engine, same
from tests.engines.vllm.test_ranks import expect_equal, names, run, thaw

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.weights.open import open_rank, open_snapshot

pytestmark = pytest.mark.vllm

RANKS = 4
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1"}
"""Two ranks a core, where there are two."""


def test_every_tensor_of_four_and_of_two(checkpoints: Callable, tmp_path: Path):
    """A model of two KV heads, each of which two of four ranks hold."""
    base = {"model": str(checkpoints("untied"))}
    four, two = tmp_path / "four.thaw", tmp_path / "two.thaw"
    ranks = run(tmp_path / "run", [base, base | thaw(four, mode="freeze"), base | thaw(four)], tp=RANKS)
    expect_equal(ranks, four)
    assert names(four) == ["rank1", "rank2", "rank3"]
    loads = [base, base | thaw(two, mode="freeze"), base | thaw(two), base | thaw(four)]
    half = run(tmp_path / "run", loads, tp=2)
    expect_equal(half, two)
    (again,) = zip(*run(tmp_path / "run", [base | thaw(two)], tp=RANKS), strict=True)
    for rank, (default, *_, resharded) in enumerate(half):
        assert resharded["report"] == "RestoreReport", f"four ranks' files in rank {rank} of two"
        assert resharded["tensors"] == default["tensors"]
    for (default, *_), resharded in zip(ranks, again, strict=True):
        assert resharded["report"] == "RestoreReport" and resharded["tensors"] == default["tensors"]
    assert len({rank[0]["tensors"]["model.layers.0.self_attn.qkv_proj.weight"] for rank in ranks}) == RANKS


@pytest.mark.soak
def test_whole_engines(soak: Callable, checkpoints: Callable, tmp_path: Path):
    """Tokens, log-probabilities and every block of keys and values as of four ranks that were never frozen."""
    ran = False
    for _ in soak(small=0, full=1):
        _engines(checkpoints("untied"), tmp_path)
        ran = True
    if not ran:
        pytest.skip("eight processes take minutes to start: make soak")


def _engines(model: Path, folder: Path) -> None:
    weights, first, second = folder / "w.thaw", folder / "first.thawkv", folder / "second.thawkv"
    args: dict[str, Any] = {"model": str(model), "tensor_parallel_size": RANKS}
    frozen = args | {
        "load_format": "thaw",
        "model_loader_extra_config": {"snapshot": str(weights), "mode": "freeze"},
    }
    default = engine(folder, [{"do": "ask", "prompts": THREE}, {"do": "ask", "prompts": THREE}], CORES, **args)
    engine(folder, [], CORES, **frozen)
    with open_snapshot(weights) as opened:
        assert len(opened.snapshot.header.ranks.members) == RANKS - 1
    steps: list[dict[str, Any]] = [
        {"do": "ask", "prompts": THREE},
        {"do": "ask", "prompts": THREE},
        {"do": "freeze", "path": first},
    ]
    thawed = engine(folder, steps, CORES, **args, snapshot=str(weights))
    assert same(thawed[0], default[0]) and same(thawed[1], default[1])
    assert len(thawed[2]["files"]) == RANKS
    again = [{"do": "freeze", "path": second}, {"do": "ask", "prompts": THREE}]
    resumed = engine(folder, again, CORES, **args, snapshot=str(weights), kv_snapshot=str(first))
    assert all(answer["cached"] > 0 for answer in resumed[1]) and same(resumed[1], default[1])
    for rank in range(RANKS):
        assert pages_by_address(second, rank) == pages_by_address(first, rank)
    with open_rank(first, 1, with_chunks=False) as opened:
        assert {kept.rank for kept in opened.snapshot.index.kept} == {0}, "of each KV head two ranks hold the same"
