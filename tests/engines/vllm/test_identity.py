"""Which ranks a set of files can stand for, told from configurations and groups as vLLM has them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from thaw_vllm.engines.vllm import identity
from thaw_vllm.errors import MismatchError, UnsupportedError
from thaw_vllm.format.identity import Identity, Parallel


def configuration(*, moe: bool = True, **parallel: Any) -> Any:
    """vLLM's, of which nothing else is looked at here."""
    sizes = {"enable_expert_parallel": False, "enable_eplb": False, "data_parallel_size": 1, "data_parallel_index": 0}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes | parallel), model_config=SimpleNamespace(is_moe=moe)
    )


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``groups(world, tp=(rank, size), …)``: what vLLM's groups say in this process."""

    def be(world: int, **given: tuple[int, int]) -> None:
        found = {short: given.get(short, (0, 1)) for short in ("tp", "pp", "ep", "dp")}
        monkeypatch.setattr(identity, "parallel_groups", lambda: found)
        monkeypatch.setattr(identity, "cpu_group", lambda: (None, world))

    return be


def test_experts_are_divided_only_where_that_is_asked_for(groups: Any):
    """vLLM makes the group for every mixture of experts."""
    groups(4, tp=(1, 2), dp=(1, 2), ep=(3, 4))
    held = {"tp_rank": 1, "tp_size": 2, "dp_rank": 1, "dp_size": 2}
    assert identity.require_ranks(configuration()) == Parallel(**held)
    asked = configuration(enable_expert_parallel=True)
    assert identity.require_ranks(asked) == Parallel(**held, ep_rank=3, ep_size=4)


def test_a_dense_model_is_the_same_with_expert_parallelism(groups: Any):
    groups(4, tp=(1, 2), pp=(1, 2))
    asked = configuration(moe=False, enable_expert_parallel=True, enable_eplb=True)
    assert identity.require_ranks(asked) == identity.require_ranks(configuration(moe=False)) == Parallel(1, 2, 1, 2)


@pytest.mark.parametrize("option", ["enable_eplb", "enable_elastic_ep"])
def test_experts_that_move_are_refused(groups: Any, option: str):
    groups(2, tp=(0, 2), ep=(0, 2))
    with pytest.raises(UnsupportedError, match=r"experts that move among ranks.*set enable_eplb=False"):
        identity.require_ranks(configuration(enable_expert_parallel=True, **{option: True}))


def test_processes_that_share_coordinates_are_refused(groups: Any):
    groups(4, tp=(0, 2))
    with pytest.raises(
        UnsupportedError, match=r"4 processes .* tensor_parallel_size=2 makes 2;.*context_parallel_size=1"
    ):
        identity.require_ranks(configuration())
    groups(2, dp=(1, 2))
    with pytest.raises(UnsupportedError, match=r"replicas of a dense model .* run each with data_parallel_size=1"):
        identity.require_ranks(configuration(moe=False))


def test_which_replica_freezes():
    assert identity.replica(configuration(moe=False, data_parallel_index=1)) == 1
    assert identity.replica(configuration(moe=False)) == 0
    assert identity.replica(configuration(data_parallel_index=1)) == 0  # all of them do


def test_a_dense_model_is_frozen_as_if_there_were_one_replica():
    config = configuration(moe=False, data_parallel_size=2, data_parallel_rank=1, data_parallel_index=1)
    identity.one_engine(config)
    found = config.parallel_config
    assert (found.data_parallel_size, found.data_parallel_rank, identity.replica(config)) == (1, 0, 0)


def test_one_executor_cannot_freeze_what_replicas_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "met_by_variables", lambda: False)
    identity.one_engine(configuration())
    words = r"held by 2 data-parallel engines together.*--data-parallel-size 2.*\"mode\": \"freeze\".*VLLM_DP_RANK"
    with pytest.raises(UnsupportedError, match=words):
        identity.one_engine(configuration(data_parallel_size=2))
    monkeypatch.setattr(identity, "met_by_variables", lambda: True)
    config = configuration(data_parallel_size=2)
    identity.one_engine(config)
    assert config.parallel_config.data_parallel_size == 2


class Experts(torch.nn.Module):
    """A layer with what is read of vLLM's."""

    def __init__(self, held: list[int] | None, rule: str = "linear") -> None:
        super().__init__()
        self.register_buffer("_expert_map", None if held is None else torch.tensor(held, dtype=torch.int32))
        self.expert_placement_strategy = rule


def model(*layers: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})


def test_the_experts_of_a_rank():
    rank = Parallel(0, 2, ep_rank=0, ep_size=2)
    linear, turns = [0, 1, -1, -1], [0, -1, 1, -1]
    found = identity.held_experts(model(Experts(linear), Experts(linear)), rank)
    assert found is not None and found.placement == "linear"
    assert found == identity.held_experts(model(Experts(linear), Experts(linear), torch.nn.Linear(1, 1)), rank)
    others = [
        model(Experts(linear)),
        model(Experts(linear), Experts(turns)),
        model(Experts(linear), Experts(linear, "round_robin")),
        model(Experts([-1, -1, 0, 1]), Experts(linear)),
        model(Experts(None), Experts(linear)),
        model(torch.nn.Linear(1, 1)),
    ]
    assert len({found, *(identity.held_experts(other, rank) for other in others)}) == len(others) + 1
    assert identity.held_experts(model(Experts(linear)), Parallel(0, 2)) is None


def test_the_digest_of_experts_is_that_of_the_format():
    """docs/format.md, section 5.4."""
    from blake3 import blake3

    found = identity.held_experts(model(Experts([-1, 0])), Parallel(1, 2, ep_rank=1, ep_size=2))
    assert found is not None and found.map == blake3(b'[["0",[-1,0]]]').hexdigest()


@pytest.mark.parametrize(
    ("held", "asked", "words"),
    [
        (Parallel(dp_size=2), {}, "frozen with data_parallel_size=2, the engine is asked to run 1; pass data_parallel"),
        (Parallel(dp_size=2), {"data_parallel_size": 4}, "is asked to run 4"),
        (Parallel(0, 2, ep_size=2), {"tensor_parallel_size": 2}, "pass enable_expert_parallel=True or freeze again"),
    ],
)
def test_options_that_cannot_lead_to_a_snapshot_are_told_before_anything_starts(held: Any, asked: Any, words: str):
    with pytest.raises(MismatchError, match=words):
        identity.check_asked("w.thaw", Identity("raw", parallel=held), asked)


def test_options_of_which_the_workers_judge(monkeypatch: pytest.MonkeyPatch):
    of = partial(Identity, "raw")
    ranks = {"data_parallel_size": 2, "enable_expert_parallel": True}
    identity.check_asked("w.thaw", of(parallel=Parallel(0, 2)), ranks)
    identity.check_asked("w.thaw", of(parallel=Parallel(dp_size=2)), {"data_parallel_size": 2})
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    identity.check_asked("w.thaw", of(parallel=Parallel(dp_size=2)), {})
    identity.check_asked("w.thaw", of(parallel=Parallel()), {})
