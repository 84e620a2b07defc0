"""Starts of an engine that is not there: ``fresh.run`` is replaced."""

import pytest
from tests.cli.ranks import freeze_set

from thaw_vllm.bench import cold_start
from thaw_vllm.errors import UsageError


class Engine:
    """Answers like ``fresh.run``; loaders in ``failing`` raise, those in ``different`` give another token."""

    def __init__(self, failing=(), different=()):
        self.failing, self.different, self.asked = failing, different, []

    def __call__(self, action, *, model, snapshot, engine_args, questions, max_tokens, environment):
        name = "snapshot" if snapshot is not None else engine_args.get("load_format", "default")
        self.asked.append((name, engine_args["enforce_eager"]))
        if name in self.failing:
            raise UsageError(f"the process failed: {name}\nis not known")
        seconds = {"process": 1.0, "imports": 20.0, "engine": 8.0, "first_token": 0.5, "answers": 3.0, "total": 40.0}
        if name != "runai_streamer":  # vLLM's log does not tell for all of them
            seconds["weights"] = 2.5
        reports = [{"verified": "wordsum", "seconds": {"total": 2.5}}] if name in ("snapshot", "thaw") else []
        tokens = [1, 2, 4 if name in self.different else 3]
        return {"seconds": seconds, "reports": reports, "outputs": [{"tokens": tokens, "logprobs": [], "text": ""}]}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    freeze_set(tmp_path / "W.thaw", 1)
    return tmp_path / "model"


@pytest.fixture
def engine(monkeypatch):
    def use(**options):
        found = Engine(**options)
        monkeypatch.setattr(cold_start.fresh, "run", found)
        return found

    monkeypatch.setattr("thaw_vllm.engines.vllm.api.require_vllm_installed", lambda: None)
    monkeypatch.setattr(cold_start.metadata, "version", lambda name: "1")
    return use


def test_every_loader_in_every_mode(thaw, model, engine, tmp_path):
    started = engine(failing=("thaw",))
    arguments = ("--model", model, "--snapshot", tmp_path / "W.thaw", "--runs", 2, "--json", "--record")
    ran = thaw("bench", "cold-start", *arguments)
    assert ran.code == 0, ran.err
    names = ["default", "snapshot", "fastsafetensors", "instanttensor", "runai_streamer"]
    assert sorted(name for name, eager in started.asked if eager and name != "thaw") == sorted(names * 2)
    assert [n for n, eager in started.asked if not eager][:2] == ["default", "snapshot"]
    assert [name for name, _ in started.asked].count("thaw") == 2  # once a mode
    found = ran.document["records"]
    starts = [r for r in found if r["work"] == "start-eager"]
    assert [(r["system"], r["route"]) for r in starts] == [
        ("vllm", "default-loader"),
        ("thaw", "snapshot"),
        ("fastsafetensors", "fastsafetensors"),
        ("instanttensor", "instanttensor"),
        ("runai-model-streamer", "runai_streamer"),
    ]
    assert all(r["seconds"] == [29.5, 29.5] and r["equal"] and r["bytes"] == 1000 for r in starts)
    assert [r["verified"] for r in starts] == [False, True, False, False, False]
    loads = [r for r in found if r["work"] == "vllm-load-weights"]
    assert len(loads) == 8 and all(r["seconds"] == [2.5, 2.5] for r in loads)
    assert {r["work"] for r in found} == {"start-eager", "start-graphs", "vllm-load-weights"}
    missed = ran.document["missed"]
    assert [(m["work"], m["route"]) for m in missed] == [("start-eager", "checkpoint"), ("start-graphs", "checkpoint")]
    assert missed[0]["why"] == "the process failed: thaw is not known"
    assert (tmp_path / "benchmarks" / "results").is_dir()


def test_other_tokens_are_told(thaw, model, engine, tmp_path):
    engine(different=("snapshot",))
    ran = thaw("bench", "cold-start", "--model", model, "--snapshot", tmp_path / "W.thaw", "--mode", "eager")
    assert ran.code == 1
    assert "NOT EQUAL: start-eager, thaw (snapshot): tokens" in ran.err
    assert "thaw: snapshot" in ran.out and " NO" in ran.out


def test_chosen_loaders_and_engine_arguments(thaw, model, engine):
    started = engine()
    arguments = ("--mode", "eager", "--loader", "default-loader", "--engine-arg", "max_model_len=64")
    ran = thaw("bench", "cold-start", "--model", model, *arguments)
    assert ran.code == 0 and started.asked == [("default", True)]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nowhere"], 6, "no model directory 'nowhere'"),
        (["--model", "."], 6, "no *.safetensors files"),
        (["--model", "model", "--snapshot", "no.thaw"], 6, "thaw freeze --model model --output no.thaw"),
        (["--model", "model", "--loader", "magic"], 2, "there is no loader 'magic'; there are default-loader"),
        (["--model", "model", "--mode", "fast"], 2, "there is no mode 'fast'; there are eager, graphs"),
        (["--model", "model", "--engine-arg", "x"], 2, "KEY=VALUE"),
    ],
)
def test_wrong_options(thaw, model, engine, arguments, code, says):
    engine()
    ran = thaw("bench", "cold-start", *arguments)
    assert ran.code == code and says in ran.err


def test_packages_that_are_not_installed(thaw, model, engine, monkeypatch):
    def missing(name):
        raise cold_start.metadata.PackageNotFoundError(name)

    started = engine()
    monkeypatch.setattr(cold_start.metadata, "version", missing)
    ran = thaw("bench", "cold-start", "--model", model, "--mode", "eager")
    assert ran.code == 0 and [name for name, _ in started.asked] == ["default", "thaw"]
    assert "runai-model-streamer (runai_streamer): not installed: pip install runai-model-streamer" in ran.out


@pytest.mark.parametrize(
    ("content", "code", "said"), [(b"text", 3, "not a thaw snapshot"), (None, 4, "thaw freeze --model M")]
)
def test_snapshot_that_no_engine_can_take(content, code, said, thaw, model, engine, tmp_path):
    """Told before anything is started."""
    import torch

    from thaw_vllm import freeze_model

    started = engine()
    if content is None:
        freeze_model(torch.nn.Linear(2, 2), tmp_path / "W.thaw", force=True)
    else:
        (tmp_path / "W.thaw").write_bytes(content * 100)
    ran = thaw("bench", "cold-start", "--model", model, "--snapshot", tmp_path / "W.thaw")
    assert ran.code == code and said in ran.err, ran.err
    assert not started.asked


def test_snapshot_loader_without_a_snapshot(thaw, model, engine):
    engine()
    ran = thaw("bench", "cold-start", "--model", model, "--loader", "snapshot")
    assert ran.code == 2 and "needs --snapshot" in ran.err


def test_nothing_measured_is_no_success(thaw, model, engine):
    engine(failing=("thaw",))
    ran = thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--loader", "checkpoint")
    assert ran.code == 1 and "checkpoint" in ran.out
