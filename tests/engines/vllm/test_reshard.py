"""Snapshots of one number of ranks in engines of another: every tensor and every answer as without a snapshot."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm import forks
from tests.engines.vllm.test_engine import ARGS, ask, freeze
from tests.weights.worlds import Gather, coordinates

from thaw_vllm.engines.vllm import resharding
from thaw_vllm.engines.vllm.divisions import divisions
from thaw_vllm.errors import MismatchError, ReplacedError, UnsupportedError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.division import WHOLE, Division, Part
from thaw_vllm.weights.freeze import FreezeOptions
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.ranks import freeze_rank
from thaw_vllm.weights.reading import RestoreOptions

pytestmark = pytest.mark.vllm

KINDS = ("tied", "untied", "biased", "moe", "latent-attention")


@pytest.fixture(scope="module")
def snapshots(checkpoints: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """``snapshots(kind, ranks)``: of a tiny checkpoint, made once."""
    room, made = tmp_path_factory.mktemp("reshard"), {}

    def get(kind: str, ranks: int) -> Path:
        if (kind, ranks) not in made:
            path = made[kind, ranks] = room / f"{kind}-{ranks}.thaw"
            freeze(checkpoints(kind), path, **sizes(ranks))
        return made[kind, ranks]

    return get


def sizes(ranks: int) -> dict[str, Any]:
    return {"tensor_parallel_size": ranks} if ranks > 1 else {}


def compared(folder: Path, model: Path, ranks: int, *paths: Path, **args: Any) -> list[list[dict[str, Any]]]:
    """For each snapshot what each rank says of it, in an engine of so many."""
    question, answer, log = (folder / name for name in ("asked.json", "answer.json", "log.txt"))
    asked = {"model": str(model), "engine_args": ARGS | sizes(ranks) | args, "snapshots": [str(path) for path in paths]}
    question.write_text(json.dumps(asked))
    program = Path(__file__).with_name("reshard_engine.py")
    command = [*forks.command(), str(program), str(question), str(answer)]
    with log.open("wb") as stream:
        variables = forks.environment(forks.PARALLEL if ranks > 1 else {})
        subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, check=False)
    assert answer.exists(), log.read_text(errors="replace")[-3000:]
    return list(json.loads(answer.read_text()).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("written", "ranks"), [(1, 2), (2, 1)])
def test_every_tensor(kind: str, written: int, ranks: int, snapshots: Callable, checkpoints: Callable, tmp_path: Path):
    """Also of the same number, which is what the comparison is held against."""
    paths = [snapshots(kind, written), snapshots(kind, ranks)]
    for said in compared(tmp_path, checkpoints(kind), ranks, *paths):
        assert len(said) == ranks
        for one in said:
            assert one.get("differing") == [] and one["compared"] > 10, one
            assert one["report"]["verified"] == "xxh3"


@pytest.mark.parametrize(("written", "ranks"), [(1, 2), (2, 1)])
def test_answers(written: int, ranks: int, snapshots: Callable, checkpoints: Callable):
    """Tokens and log-probabilities of an engine of so many ranks."""
    default = ask(checkpoints("biased"), None, **sizes(ranks))
    thawed = ask(checkpoints("biased"), snapshots("biased", written), **sizes(ranks))
    assert len(thawed["reports"]) == ranks
    assert thawed["outputs"] == default["outputs"]


def test_a_quantised_model(snapshots: Callable, checkpoints: Callable):
    """Before an engine is started."""
    import thaw_vllm

    with pytest.raises(MismatchError, match="was frozen with tensor_parallel_size=1, the engine is asked to run 2"):
        thaw_vllm.load(str(checkpoints("int8")), snapshots("int8", 1), tensor_parallel_size=2)


class OfTheModel(torch.nn.Module):
    """A layer that loads its parameter in its own way."""

    def __init__(self, loader: Any = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 2))
        self.register_buffer("table", torch.zeros(3))
        self.weight.weight_loader = self.own if loader is None else loader

    def own(self, parameter: Any, loaded: Any) -> None: ...


@pytest.mark.parametrize("loader", [None, lambda parameter, loaded: None])
def test_a_parameter_that_is_loaded_in_another_way(loader: Any):
    model = torch.nn.Sequential(OfTheModel(loader))
    with pytest.raises(UnsupportedError, match=r"'0\.weight' is not known: .*in its own way"):
        divisions(model, ["0.table", "0.weight"])
    assert divisions(model, ["0.table"]) == {"0.table": WHOLE}


def test_a_layer_that_is_not_as_it_is_known():
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    layer = OfTheModel(None)
    layer.weight.weight_loader = ColumnParallelLinear.weight_loader.__get__(layer)
    layer.weight.output_dim = 0
    with pytest.raises(UnsupportedError, match="OfTheModel is not as it is known here"):
        divisions(torch.nn.Sequential(layer), ["0.weight"])


@pytest.mark.parametrize("disabled", [False, True])
def test_a_parameter_beside_divided_layers(disabled: bool):
    """Such as one for each head, which a model's own loading may have divided; its shape need not say so."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    attention = torch.nn.Module()
    attention.sink = torch.nn.Parameter(torch.zeros(64))
    attention.wq = ColumnParallelLinear.__new__(ColumnParallelLinear)
    torch.nn.Module.__init__(attention.wq)
    attention.wq.disable_tp = disabled
    model = torch.nn.Sequential(attention)
    if disabled:
        assert divisions(model, ["0.sink"]) == {"0.sink": WHOLE}
    else:
        with pytest.raises(UnsupportedError, match=r"'0\.sink' is not known: .*its own part"):
            divisions(model, ["0.sink"])
    attention.register_buffer("scale", torch.ones(()))
    assert divisions(model, ["0.scale"]) == {"0.scale": WHOLE}, "one number is no part of anything"


def frozen(target: Path, value: int, places: list[dict[str, int]]) -> None:
    """A set of so many ranks, each with one row of the value for each of two stages' layers."""
    outcomes: list[Any] = [None] * len(places)
    gather = Gather(len(places))

    def run(rank: int) -> None:
        parallel = Parallel(**places[rank])
        header = Header(Identity("raw", engine="vllm", parallel=parallel))
        name = f"layer{parallel.pp_rank}"
        captured = capture([(name, "parameter", torch.full((4, 4), float(value)))])
        outcomes[rank] = freeze_rank(target, header, captured, FreezeOptions(force=True), gather.of(rank), lambda: None)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in outcomes


def thawed(stage: int, stages: int, path: Path) -> torch.Tensor:
    model = torch.nn.Module()
    model.register_parameter(f"layer{stage}", torch.nn.Parameter(torch.zeros(8, 4)))
    identity = Identity("raw", engine="vllm", parallel=Parallel(pp_rank=stage, pp_size=stages))
    told: list[str | None] = []

    def begin(opened: str | None) -> None:
        told.append(opened)
        model.get_parameter(f"layer{stage}").detach().fill_(-1)  # nothing was written yet

    resharding.thaw(
        model, identity, str(path), 2, RestoreOptions(), None, lambda opened, wanted: opened.snapshot.header, begin
    )
    with open_snapshot(path) as opened:
        assert told == [opened.snapshot.header.set_id]
    return model.get_parameter(f"layer{stage}").detach()


def rows(model: Any, names: list[str]) -> dict[str, Division]:
    return {name: Division(0, (Part(8),)) for name in names}


def test_every_stage_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resharding, "divisions", rows)
    frozen(tmp_path / "w.thaw", 3, coordinates(tp=2, pp=2))
    for stage in range(2):
        assert bool((thawed(stage, 2, tmp_path / "w.thaw") == 3).all())


def test_a_set_that_is_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No model has some of one and some of another."""
    monkeypatch.setattr(resharding, "divisions", rows)
    frozen(tmp_path / "w.thaw", 1, coordinates(tp=2))
    real = resharding.open_rank

    def opened(path: Any, rank: int, **options: Any) -> Any:
        if rank == 1:
            frozen(tmp_path / "w.thaw", 2, coordinates(tp=2))
        return real(path, rank, **options)

    monkeypatch.setattr(resharding, "open_rank", opened)
    with pytest.raises(ReplacedError, match="was replaced by another set"):
        thawed(0, 1, tmp_path / "w.thaw")
