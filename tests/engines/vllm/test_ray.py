"""Several ranks whose workers are Ray's processes, as across machines: vLLM's own Ray executor, a real Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.forks import PARALLEL
from tests.engines.vllm.test_automatic_engines import flip
from tests.engines.vllm.test_engine import freeze
from tests.engines.vllm.test_kv import ARGS, THREE, error, run_script, same

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.weights.open import open_rank

pytest.importorskip("ray", reason="Ray is not installed")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


def engine(folder: Path, steps: list[dict[str, Any]], **args: Any) -> Any:
    """The answers of two ranks."""
    return answers_to(folder, [{"do": "engine"} | ARGS | RANKS | args, *steps])


def answers_to(folder: Path, steps: list[dict[str, Any]]) -> Any:
    own = {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    return run_script("ray_engine.py", folder, steps, PARALLEL | own)


def test_two_ranks(checkpoints: Callable, tmp_path: Path):
    two_ranks(checkpoints("tied"), tmp_path, "xxh3")


def two_ranks(checkpoint: Path, tmp_path: Path, verified: str, **args: Any) -> None:
    """Every tensor, every block, tokens and log-probabilities; and a rank that fails says so to the caller."""
    model, path = str(checkpoint), tmp_path / "w.thaw"
    first, second = tmp_path / "first.thawkv", tmp_path / "second.thawkv"
    freezing = {"load_format": "thaw", "model_loader_extra_config": {"snapshot": str(path), "mode": "freeze"}}
    asked, answers, kv, executor = engine(
        tmp_path,
        [
            {"do": "ask", "prompts": THREE},
            {"do": "ask", "prompts": THREE},
            {"do": "freeze", "path": first},
            {"do": "executor"},
        ],
        model=model,
        **args,
        **freezing,
    )
    assert executor == "RayExecutorV2" and len(kv["files"]) == 2
    assert [answer["cached"] for answer in asked] != [answer["cached"] for answer in answers]

    torn, other = tmp_path / "torn" / "w.thaw", tmp_path / "other.thaw"
    torn.parent.mkdir()
    for file in tmp_path.glob("w.*"):
        shutil.copy(file, torn.parent / file.name, follow_symlinks=False)
    with open_rank(torn, 1) as opened:
        member = Path(opened.source.name)
        flip(member, opened.snapshot.preamble.payload_at + opened.snapshot.chunks[-1].stored_at)

    thawed, _, reports = engine(
        tmp_path,
        [{"do": "ask", "prompts": THREE}, {"do": "freeze", "path": second}, {"do": "reports"}],
        model=model,
        snapshot=str(path),
        kv_snapshot=str(first),
        **args,
    )
    (failed,) = answers_to(tmp_path, [{"do": "load", "snapshot": torn} | ARGS | RANKS | args])
    assert all(answer["cached"] > 0 for answer in thawed) and same(thawed, answers)
    assert [report["verified"] for report in reports] == [verified, verified]
    freeze(checkpoint, other, tensor_parallel_size=2, **args)  # by vLLM's multiprocess executor
    for rank in (0, 1):
        with open_rank(path, rank, with_chunks=False) as ours, open_rank(other, rank, with_chunks=False) as theirs:
            assert ours.snapshot.header.content == theirs.snapshot.header.content
        assert pages_by_address(first, rank) == pages_by_address(second, rank)
    assert error(failed).startswith("CorruptionError") and member.name in error(failed)
