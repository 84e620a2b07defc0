"""Engines of every kind of rank: real worlds of processes, every tensor of each rank compared before post-processing.

Not whole engines: the kernel for experts of vLLM's CPU build passes over the map of experts, and reads beyond its
weights where a rank has a part of them.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm import forks

from thaw_vllm.errors import UnsupportedError
from thaw_vllm.format.identity import Parallel
from thaw_vllm.weights.open import open_rank, open_snapshot
from thaw_vllm.weights.verify import verify

pytestmark = pytest.mark.vllm

EXPERT = {"enable_expert_parallel": True}


def run(
    room: Path, loads: list[dict[str, Any]], *, tp: int = 1, pp: int = 1, dp: int = 1, dense: bool = False
) -> list[list[dict]]:
    """What each rank answered, in the order of their files."""
    room.mkdir(exist_ok=True)
    port, processes, answers = free_port(), [], []
    for number in range(tp * pp * dp):
        replica, of = divmod(number, tp * pp)
        request = {"replica": replica, "of": of, "device": number, "tp": tp, "pp": pp, "loads": loads}
        request["rendezvous"] = f"file://{room / f'rendezvous-{port}-{replica}'}"
        asked, answer = room / f"asked-{number}.json", room / f"answer-{port}-{number}.json"
        asked.write_text(json.dumps(request))
        together = {
            "VLLM_DP_SIZE": str(dp),
            "VLLM_DP_RANK": str(replica),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        own = {"VLLM_DIST_IDENT": f"{port}-{replica}"}  # an executor of vLLM's CPU build names shared memory so
        command = [*forks.command(), "-m", "tests.engines.vllm.rank_program", str(asked), str(answer)]
        log = (room / f"log-{number}.txt").open("wb")
        variables = forks.environment(own | (together if dp > 1 and not dense else {}))
        processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables))
        answers.append(answer)
    try:
        for number, process in enumerate(processes):
            if process.wait(300):
                pytest.fail(f"rank {number} ended so: {(room / f'log-{number}.txt').read_text()[-3000:]}")
    finally:
        for process in processes:
            process.kill()
    return [json.loads(answer.read_text()) for answer in answers]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def thaw(path: Path, **options: Any) -> dict[str, Any]:
    return {"load_format": "thaw", "model_loader_extra_config": {"snapshot": str(path)} | options}


def names(path: Path) -> list[str]:
    """Of the members, by rank, as people see them."""
    with open_snapshot(path) as opened:
        return [member.name.split(".")[2] for member in opened.snapshot.header.ranks.members]


def expect_equal(ranks: list[list[dict]], path: Path) -> None:
    """Of three loads, vLLM's own, one that froze and one that thawed: the same tensors in each rank."""
    for default, frozen, thawed in (rank[:3] for rank in ranks):
        assert "error" not in default and default["tensors"]
        assert frozen.get("error") is None and thawed.get("error") is None
        assert default["tensors"] == frozen["tensors"] == thawed["tensors"]
        assert thawed["report"] == "RestoreReport"
    report = verify(path, content=True)
    assert len(report.files) == len(ranks)


def test_experts_and_replicas_of_a_mixture_of_experts(checkpoints: Callable, tmp_path: Path):
    model, path = str(checkpoints("moe")), tmp_path / "w.thaw"
    base = {"model": model} | EXPERT
    loads = [base, base | thaw(path, mode="freeze"), base | thaw(path), {"model": model} | thaw(path)]
    ranks = run(tmp_path / "run", loads, tp=2, dp=2)
    expect_equal(ranks, path)
    assert names(path) == ["dp0-pp0-tp1", "dp1-pp0-tp0", "dp1-pp0-tp1"]
    places = [{name: number for name, number in rank[2].items() if name[2:] in ("_rank", "_size")} for rank in ranks]
    sizes = {"tp_size": 2, "pp_size": 1, "dp_size": 2, "ep_size": 4, "pp_rank": 0}
    assert places == [sizes | {"tp_rank": n % 2, "dp_rank": n // 2, "ep_rank": n} for n in range(4)]
    experts = "model.layers.0.mlp.experts.routed_experts.w13_weight"
    assert len({rank[0]["tensors"][experts] for rank in ranks}) == 4
    for rank in ranks:
        assert "or start the engine with enable_expert_parallel=True" in rank[3]["error"]
    for number in (1, 2, 3):
        with open_rank(path, number, with_chunks=False) as opened:
            kept = {kept.rank for kept in opened.snapshot.index.kept}
        assert kept == ({number % 2} if number > 1 else set()), "what replicas hold alike is in the first one's files"


def test_experts_that_are_placed_in_turns(checkpoints: Callable, tmp_path: Path):
    """Tensors of the same names and shapes hold others; and vLLM places them so in some models only."""
    room, ranks = tmp_path / "run", {}
    turns = EXPERT | {"expert_placement_strategy": "round_robin"}
    for kind in ("groups-of-experts", "moe"):
        base, path = {"model": str(checkpoints(kind))}, tmp_path / f"{kind}.thaw"
        loads = [base | EXPERT, base | EXPERT | thaw(path, mode="freeze"), base | EXPERT | thaw(path)]
        ranks[kind] = run(room, [*loads, base | turns | thaw(path)], tp=2)
        expect_equal(ranks[kind], path)
        assert names(path) == ["rank1"]
    for rank in ranks["groups-of-experts"]:
        assert (
            "holds experts placed linear" in rank[3]["error"]
            and "this engine has experts placed round" in rank[3]["error"]
        )
    for rank in ranks["moe"]:  # one group of experts: vLLM passes over it
        assert rank[3]["tensors"] == rank[2]["tensors"]


def test_pipeline_stages(checkpoints: Callable, tmp_path: Path):
    base, path = {"model": str(checkpoints("tied"))}, tmp_path / "w.thaw"
    ranks = run(tmp_path / "run", [base, base | thaw(path, mode="freeze"), base | thaw(path)], pp=2)
    expect_equal(ranks, path)
    assert names(path) == ["pp1-tp0"]


def test_pipeline_stages_of_replicas_that_share_experts(checkpoints: Callable, tmp_path: Path):
    base, path = {"model": str(checkpoints("moe"))} | EXPERT, tmp_path / "w.thaw"
    ranks = run(tmp_path / "run", [base, base | thaw(path, mode="freeze"), base | thaw(path)], pp=2, dp=2)
    expect_equal(ranks, path)
    assert names(path) == ["dp0-pp1-tp0", "dp1-pp0-tp0", "dp1-pp1-tp0"]
    assert [(rank[2]["ep_rank"], rank[2]["ep_size"]) for rank in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_replicas_of_a_dense_model_thaw_the_same_set(checkpoints: Callable, tmp_path: Path):
    base, path = {"model": str(checkpoints("tied")), "data_parallel_size": 2}, tmp_path / "w.thaw"
    freezing = run(tmp_path / "run", [base | thaw(path, mode="freeze")], dp=2, dense=True)
    assert [rank[0]["report"] for rank in freezing] == ["FreezeReport", None]
    with open_snapshot(path) as opened:
        assert opened.snapshot.header.identity.parallel == Parallel()
    thawing = run(tmp_path / "run", [base | thaw(path)], dp=2, dense=True)
    assert [rank[0]["report"] for rank in thawing] == ["RestoreReport"] * 2
    assert [rank[0]["tensors"] for rank in thawing] == [rank[0]["tensors"] for rank in freezing]


def test_one_executor_freezes_a_dense_model_for_all_replicas(checkpoints: Callable, tmp_path: Path):
    """And says how a mixture of experts is frozen, which its replicas hold together."""
    args = {"enforce_eager": True, "max_model_len": 256, "data_parallel_size": 2}
    frozen = forks.run("freeze", model=str(checkpoints("tied")), snapshot=tmp_path / "w.thaw", engine_args=args)
    assert len(frozen["reports"]) == 1
    with open_snapshot(tmp_path / "w.thaw") as opened:
        assert opened.snapshot.header.identity.parallel == Parallel()
    with pytest.raises(UnsupportedError, match="held by 2 data-parallel engines together"):
        forks.run("freeze", model=str(checkpoints("moe")), snapshot=tmp_path / "m.thaw", engine_args=args)
