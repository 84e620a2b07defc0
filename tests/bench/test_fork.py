"""Engines that are not there, their processes replaced; and real ones once, at a small size."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from tests.bench.engines import SIZE, Engines, report

from thaw_vllm.bench import ceilings, fork
from thaw_vllm.bench.outcome import Outcome
from thaw_vllm.bench.process import ChildError
from thaw_vllm.bench.record import Record
from thaw_vllm.errors import SpaceError, UsageError

KEPT = ["fork-prefills", "fork-prefix", "fork", "checkpoint"]
WORKS = [*KEPT, "session-restore", "fork-thawed"]


class Asked(Engines):
    """``kept``, ``thawed`` and ``pool`` change what they say."""

    def __init__(self, kept=None, thawed=None, pool=None):
        super().__init__({"fork-keep": kept or {}, "fork-thaw": thawed or {}, "fork-pool": pool or {}})

    def __call__(self, task, request, say):
        return super().__call__(task, request, say) | {"shared": True, "mib": 20000.0}

    def fork_keep(self, tokens):
        return {
            "prefills": asked(tokens / 1e3, 0),
            "prefix": [{"seconds": 0.3, "tokens": [1, 2, 3], "cached": [0, 1008, 1008]}] * 2,
            "fork": asked(0.4, 1008),
            "checkpoint": [0.2, 0.1],
            "reports": [report(tokens)] * 2,
            "cached": 1008,
        }

    def fork_thaw(self, tokens):
        return {
            "restore": [0.09, 0.03],
            "reports": [report(tokens) | {"present": 0, "left_out": 0, "lost": 0}] * 2,
            "fork": asked(0.1, 1008),
            "different": None,
        }

    def fork_pool(self, tokens):
        return {"first": 0.9, "round": [0.5, 0.4], "tokens": [[[1, 2], [3, 4]]] * 3}


def asked(seconds, cached, tokens=(1, 2, 3)):
    """Two runs of three continuations."""
    return [{"seconds": seconds, "tokens": list(tokens), "cached": [cached] * 3}] * 2


@pytest.fixture
def engines(in_place_of_engines):
    return lambda **changes: in_place_of_engines(fork, Asked(**changes))


def test_records(thaw, model, engines, tmp_path):
    started = engines()
    arguments = ("--tokens", 2048, "--tokens", 1024, "--branches", 3, "--dir", "files")
    ran = thaw("bench", "fork", "--model", "M", *arguments, "--json")
    assert ran.code == 0, ran.err
    found = ran.document["records"]
    assert [(r["tokens"], r["work"]) for r in found] == [(n, work) for n in (2048, 1024) for work in WORKS]
    prefills, prefix, forked, checkpoint, restore, thawed = found[:6]
    asks = (prefills, prefix, forked, thawed)
    assert [r["system"] for r in asks] == ["vllm", "vllm", "thaw", "thaw"]
    assert {(r["route"], r["bytes"], r["branches"]) for r in asks} == {("eager", 0, 3)}
    assert [r["seconds"] for r in asks] == [[2.048] * 2, [0.3] * 2, [0.4] * 2, [0.1] * 2]
    assert [r["equal"] for r in asks] == [None, None, True, True] and prefix["cached"] == [0, 1008, 1008]
    assert forked["cached"] == thawed["cached"] == 1008 and forked["tokens_equal"] and thawed["tokens_equal"]
    assert thawed["with_restore"] == [0.19, 0.13]
    for moved, seconds, verified in ((checkpoint, [0.2, 0.1], False), (restore, [0.09, 0.03], True)):
        assert (moved["system"], moved["route"], moved["seconds"]) == ("thaw", "store", seconds)
        assert (moved["bytes"], moved["blocks"], moved["directory"]) == (2048 * SIZE, 128, "files")
        assert moved["equal"] and moved["verified"] is verified and moved["first_s"] == seconds[0]
        assert moved["phases"] == {"table": [0.001] * 2, "read": [0.01] * 2, "engine": [0.02] * 2}
    (task, request), (other, again) = started.asked
    assert (task, other) == ("fork-keep", "fork-thaw") and request == again and request["branches"] == 3
    assert request["engine_args"] == {"enforce_eager": True, "enable_prefix_caching": True, "max_model_len": 2048 + 64}
    assert request["vocabulary"] == 5000 and not list((tmp_path / "files").iterdir())


def test_table_and_recorded_lines(thaw, model, engines, tmp_path):
    started = engines()
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files", "--record", "--graphs")
    assert ran.code == 0 and started.asked[0][1]["branches"] == 8, ran.err
    head, row = ran.out.strip().splitlines()
    assert head.split()[:5] == ["TOKENS", "N", "MB", "PREFILLS", "S"]
    figures = ["1.0240", "0.3000", "0.4000", "0.1000", "0.0600", "0.1500", "2.24", "2.6", "6.4"]
    assert row.split() == ["1024", "8", "134.2", *figures, "yes"]
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["work"] for line in lines] == WORKS and {line["route"] for line in lines} == {"store", "graphs"}


def test_a_pool(thaw, model, engines, tmp_path):
    started = engines()
    (tmp_path / "w.thaw").touch()
    arguments = ("--tokens", 2048, "--tokens", 1024, "--dir", "files", "--snapshot", "w.thaw", "--workers", 3)
    ran = thaw("bench", "fork", "--model", "M", *arguments, "--json")
    assert ran.code == 0, ran.err
    found = [record for record in ran.document["records"] if record["work"] == "fork-pool"]
    assert [record["tokens"] for record in found] == [2048, 1024]
    told = {"branches": 4, "length": 64, "workers": 3, "first_s": 0.9, "shared": True, "gpu_mib": 20000.0}
    assert all(record.items() >= (told | {"seconds": [0.5, 0.4], "tokens_equal": True}).items() for record in found)
    task, request = started.asked[2]
    assert (task, request["snapshot"], request["workers"]) == ("fork-pool", "w.thaw", 3)
    engines(pool={"tokens": [[[1]], [[2]]]})
    ran = thaw("bench", "fork", "--model", "M", *arguments)
    assert ran.code == 0 and " 0.4500 " in ran.out
    ran = thaw("bench", "fork", "--model", "M", "--dir", "files", "--snapshot", "nowhere.thaw")
    assert ran.code == 6 and "there is no snapshot 'nowhere.thaw'" in ran.err


def test_a_pool_that_does_not_start_is_a_line(thaw, model, engines, tmp_path):
    engines(pool=ChildError("the fork pool: ValueError: no"))
    (tmp_path / "w.thaw").touch()
    arguments = ("--tokens", 1024, "--dir", "files", "--snapshot", "w.thaw")
    ran = thaw("bench", "fork", "--model", "M", *arguments)
    assert ran.code == 1 and "fork-pool: thaw: the fork pool: ValueError: no" in ran.out


@pytest.mark.parametrize(
    ("kept", "thawed", "said"),
    [
        ({"fork": asked(0.4, 992)}, {}, "fork, thaw (eager): 992 tokens of a prompt were cached, not 1008"),
        ({}, {"fork": asked(0.4, 0)}, "fork-thawed, thaw (eager): 0 tokens of a prompt were cached, not 1008"),
        ({}, {"different": "1 of 64 pages"}, "session-restore, thaw (store): 1 of 64 pages"),
        (
            {},
            {"reports": [report(1024) | {"present": 0, "left_out": 2, "lost": 1}] * 2},
            "session-restore, thaw (store): 2 blocks left out, 1 blocks lost",
        ),
    ],
)
def test_not_equal(thaw, model, engines, kept, thawed, said):
    engines(kept=kept, thawed=thawed)
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files")
    assert ran.code == 1 and f"NOT EQUAL: {said}\n" in ran.err
    assert ran.out.split()[-1] == "NO"


def test_other_tokens_are_told_and_fail_nothing(thaw, model, engines):
    engines(thawed={"fork": asked(0.1, 1008, tokens=(1, 2, 4))})
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files", "--json")
    assert ran.code == 0 and [r.get("tokens_equal") for r in ran.document["records"][2::3]] == [True, False]


def test_an_engine_that_does_not_take_up_is_a_line(thaw, model, engines, tmp_path):
    engines(thawed=ChildError("the engine that takes up: ValueError: no"))
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files", "--record")
    assert ran.code == 1
    assert "session-restore, fork-thawed: thaw: the engine that takes up: ValueError: no" in ran.out
    assert " 1.0240 " in ran.out and not list((tmp_path / "files").iterdir())
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["work"] for line in lines] == KEPT and lines[-1]["equal"] is None


def test_an_engine_that_does_not_keep_is_the_end(thaw, model, engines, tmp_path):
    engines(kept=SpaceError("the engine that keeps: 'files' is full"))
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files")
    assert ran.code == 6 and ran.err.endswith("error: the engine that keeps: 'files' is full\n")
    assert not list((tmp_path / "files").iterdir())


def test_lengths_that_fit(thaw, model, engines):
    """As much as a model of 8192 tokens has room for, with an answer."""
    started = engines()
    (model / "config.json").write_text(json.dumps({"vocab_size": 5000, "max_position_embeddings": 8192}))
    assert thaw("bench", "fork", "--model", "M", "--dir", "files").code == 0
    assert started.asked[0][1]["tokens"] == (4096, 8128)
    (model / "config.json").write_text(json.dumps({"vocab_size": 5000, "max_position_embeddings": 8000}))
    ran = thaw("bench", "fork", "--model", "M", "--dir", "files")
    assert ran.code == 0 and started.asked[-1][1]["tokens"] == (4096,)
    assert "left out: 8128 tokens and an answer of 16 are more than the 8000 that the model may have" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nowhere"], 6, "no model directory 'nowhere'"),
        (["--model", "M", "--dir", "nowhere"], 6, "no directory 'nowhere'"),
        (["--model", "M", "--branches", "1"], 2, "--branches"),
        (["--model", "M", "--tokens", "0"], 2, "--tokens"),
        (["--model", "M", "--workers", "2"], 2, "with --snapshot"),
        (["--model", "M", "--workers", "5"], 2, "--workers"),
        (["--model", "M"], 2, "4096 tokens and an answer of 16 are more than the 4096"),
        (["--model", "M", "--tokens", "4090"], 2, "4090 tokens and an answer of 16 are more than the 4096"),
        (["--model", "M", "--tokens", "512", "--engine-arg", "max_model_len=512"], 2, "max_model_len=N"),
    ],
)
def test_wrong_options(thaw, model, engines, arguments, code, says):
    started = engines()
    ran = thaw("bench", "fork", *arguments)
    assert ran.code == code and says in ran.err and not started.asked


def test_the_link_is_the_limit_with_a_gpu(thaw, model, engines, monkeypatch):
    started = engines()

    def link(work, settings, say):
        return Outcome([Record(work, "limit", "route", 10**9, [0.1], "warm", False, None)])

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ceilings, "link", link)
    ran = thaw("bench", "fork", "--model", "M", "--tokens", 1024, "--dir", "files", "--json")
    assert ran.code == 0, ran.err
    found = {record["work"]: record for record in ran.document["records"]}
    assert "h2d" in found and found["fork"]["route"] == "graphs"
    assert found["session-restore"]["of_limit"] == pytest.approx(1024 * SIZE / 0.06 / 1e10, abs=1e-4)
    assert not started.asked[0][1]["engine_args"]["enforce_eager"]


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_engines(thaw, tmp_path, cpu, forked_engines):
    from tests.engines.vllm.models import KINDS

    (tmp_path / "files").mkdir()
    model = KINDS["tied"](tmp_path / "model")
    arguments = ("--tokens", 300, "--tokens", 160, "--branches", 3, "--runs", 2, "--dir", "files")
    ran = thaw("bench", "fork", "--model", model, *arguments, "--engine-arg", "block_size=32", "--json")
    assert ran.code == 0, ran.err
    found = ran.document["records"]
    assert [(r["tokens"], r["work"]) for r in found] == [(n, work) for n in (300, 160) for work in WORKS]
    assert all(len(r["seconds"]) == 2 for r in found)
    assert {r["equal"] for r in found if r["system"] == "thaw"} == {True}
    cached = {(r["tokens"], r["work"]): r["cached"] for r in found if "cached" in r}
    for tokens, whole in ((300, 288), (160, 128)):  # the last token is always computed
        assert cached[tokens, "fork"] == cached[tokens, "fork-thawed"] == whole
        assert cached[tokens, "fork-prefix"][0] == 0
    blocks = {(r["tokens"], r["blocks"]) for r in found if "blocks" in r}
    assert blocks == {(300, 9), (160, 5)}
    assert len({r["bytes"] / r["blocks"] for r in found if "blocks" in r}) == 1
    assert not list((tmp_path / "files").iterdir())


def test_requests_that_share_nothing_have_to_fit_in_the_cache(monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from thaw_vllm.bench.fork_task import _need_cache
    from thaw_vllm.engines.vllm.kv import api

    monkeypatch.setattr(api, "kv_cache_info", lambda llm, model_id: {"blocks": 101, "block_size": 16})
    asked = {"model_id": "m", "branches": 9}
    _need_cache(SimpleNamespace(llm=None), 160, asked)
    with pytest.raises(UsageError, match="holds 9 prompts of 160 tokens that share nothing, not 10"):
        _need_cache(SimpleNamespace(llm=None), 160, asked | {"branches": 10})
