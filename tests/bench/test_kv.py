"""Engines that are not there, their processes replaced; and real ones once, at a small size."""

import json
import shutil
from importlib.util import find_spec

import pytest
from tests.bench.engines import SIZE, Engines, report

from thaw_vllm.bench import ceilings, kv, kv_pages
from thaw_vllm.bench.kv_task import prompt
from thaw_vllm.bench.outcome import Outcome
from thaw_vllm.bench.process import ChildError
from thaw_vllm.bench.record import Record
from thaw_vllm.errors import SpaceError, ThawError

ANSWER = {"tokens": [7, 8, 9], "logprobs": [-0.5, -0.25, -1.0], "cached": 1008}


class Asked(Engines):
    """``frozen`` and ``thawed`` change what they say."""

    def __init__(self, frozen=None, thawed=None):
        super().__init__({"kv-freeze": frozen or {}, "kv-thaw": thawed or {}})

    def kv_freeze(self, tokens):
        return {
            "cold": [tokens / 1e4] * 2,
            "prefix": [0.011, 0.013],
            "freeze": [0.2, 0.1],
            "reports": [report(tokens)] * 2,
            "cached": 1008,
            "answer": ANSWER,
            "cold_answer": ANSWER | {"logprobs": [-0.5, -0.375, -1.0], "cached": 0},
        }

    def kv_thaw(self, tokens):
        return {
            "restore": [0.09, 0.03],
            "thawed": [0.01, 0.014],
            "reports": [report(tokens)] * 2,
            "small_restore": [0.02, 0.04],
            "small_reports": [report(tokens)] * 2,
            "small_file": 6 * 10**7,
            "cached": 1008,
            "answer": ANSWER,
            "different": None,
            "small_different": None,
            "cold_answer": ANSWER | {"logprobs": [-0.5, -0.375, -1.0], "cached": 0},
            "hit_answer": ANSWER,
        }


@pytest.fixture
def engines(in_place_of_engines):
    return lambda frozen=None, thawed=None: in_place_of_engines(kv, Asked(frozen, thawed))


def test_records(thaw, model, engines, tmp_path):
    started = engines()
    ran = thaw(*("bench", "kv", "--model", "M", "--tokens", 2048, "--tokens", 1024, "--dir", "files", "--json"))
    assert ran.code == 0, ran.err
    found = ran.document["records"]
    works = ["kv-freeze", "ttft-cold", "ttft-prefix", "kv-restore", "kv-restore-compressed", "ttft-thawed"]
    assert [(r["tokens"], r["work"]) for r in found] == [(n, work) for n in (2048, 1024) for work in works]
    freeze, cold, prefix, restore, small, thawed = found[:6]
    assert (freeze["system"], freeze["route"], freeze["seconds"]) == ("thaw", "background", [0.2, 0.1])
    assert freeze["bytes"] == restore["bytes"] == 2048 * SIZE and freeze["directory"] == "files"
    assert [(r["system"], r["route"], r["bytes"], r["gb_per_s"]) for r in (cold, prefix)] == [
        ("vllm", "eager", 0, 0)
    ] * 2
    assert cold["seconds"] == [0.2048] * 2 and cold["equal"] is None
    assert (restore["route"], restore["seconds"], restore["first_s"]) == ("restore", [0.09, 0.03], 0.09)
    assert restore["verified"] and restore["equal"] and restore["blocks"] == 128
    assert restore["phases"] == {"table": [0.001] * 2, "read": [0.01] * 2, "engine": [0.02] * 2}
    assert (small["seconds"], small["stored"], small["wire_gb_per_s"]) == ([0.02, 0.04], 6 * 10**7, 2.0)
    assert small["bytes"] == restore["bytes"] and small["verified"] and small["equal"]
    assert thawed["with_restore"] == [0.1, 0.044] and thawed["equal"]
    assert thawed["cold_tokens_equal"] and thawed["cold_logprob_difference"] == 0.125
    assert thawed["engines_equal"] and thawed["own_hit_equal"]
    (task, request), (other, again) = started.asked
    assert (task, other) == ("kv-freeze", "kv-thaw") and request == again
    assert request["engine_args"] == {"enforce_eager": True, "enable_prefix_caching": True, "max_model_len": 2048 + 64}
    assert request["vocabulary"] == 5000 and not list((tmp_path / "files").iterdir())


def test_table_and_recorded_lines(thaw, model, engines, tmp_path):
    engines()
    ran = thaw("bench", "kv", "--model", "M", "--tokens", 1024, "--dir", "files", "--record", "--graphs")
    assert ran.code == 0, ran.err
    head, row = ran.out.strip().splitlines()
    assert head.split() == [
        *("TOKENS", "MB", "COLD", "S", "PREFIX", "S", "THAWED", "S", "RESTORE", "S", "GB/S", "OF", "LIMIT"),
        *("FREEZE", "S", "COLD/THAWED", "COLD/(RESTORE+THAWED)", "EQUAL"),
    ]
    assert row.split() == [
        "1024",
        "134.2",
        "0.1024",
        "0.0120",
        "0.0120",
        "0.0600",
        "2.24",
        "0.1500",
        "8.5",
        "1.4",
        "yes",
    ]
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 6 and {line["route"] for line in lines} == {"background", "restore", "graphs"}


@pytest.mark.parametrize(
    ("thawed", "said"),
    [
        ({"answer": ANSWER | {"tokens": [7, 8, 1]}}, "ttft-thawed, thaw (eager): tokens"),
        ({"answer": ANSWER | {"logprobs": [-0.5, -0.25, -1.0000001]}}, "ttft-thawed, thaw (eager): logprobs"),
        (
            {"answer": ANSWER | {"tokens": [7, 8, 8]}, "hit_answer": ANSWER | {"tokens": [7, 8, 8]}},
            "ttft-thawed, thaw (eager): tokens; without any thawing the two engines answer differently in the same way",
        ),
        ({"cached": 0}, "ttft-thawed, thaw (eager): 0 of 1008 tokens were cached"),
        ({"different": "1 of 64 pages"}, "kv-restore, thaw (restore): 1 of 64 pages"),
        ({"small_different": "2 of 64 pages"}, "kv-restore-compressed, thaw (restore): 2 of 64 pages"),
    ],
)
def test_not_equal(thaw, model, engines, thawed, said):
    engines(thawed=thawed)
    ran = thaw("bench", "kv", "--model", "M", "--tokens", 1024, "--dir", "files")
    assert ran.code == 1 and f"NOT EQUAL: {said}\n" in ran.err
    assert ran.out.split()[-1] == "NO"


def test_an_engine_that_does_not_thaw_is_a_line(thaw, model, engines, tmp_path):
    engines(thawed=ChildError("the engine that thaws: ValueError: no"))
    ran = thaw("bench", "kv", "--model", "M", "--tokens", 1024, "--dir", "files")
    assert ran.code == 1
    assert "kv-restore, kv-restore-compressed, ttft-thawed: thaw: the engine that thaws: ValueError: no" in ran.out
    assert " 0.1024 " in ran.out and not list((tmp_path / "files").iterdir())


def test_an_engine_that_does_not_freeze_is_the_end(thaw, model, engines, tmp_path):
    engines(frozen=SpaceError("the engine that freezes: 'files' is full"))
    ran = thaw("bench", "kv", "--model", "M", "--tokens", 1024, "--dir", "files")
    assert ran.code == 6 and ran.err.endswith("error: the engine that freezes: 'files' is full\n")
    assert not list((tmp_path / "files").iterdir())


def test_lengths_that_fit(thaw, model, engines):
    started = engines()
    ran = thaw("bench", "kv", "--model", "M", "--dir", "files")
    assert ran.code == 0 and started.asked[0][1]["tokens"] == (1024, 2048)
    assert "left out: 4096 tokens and an answer of 16 are more than the 4096 that the model may have" in ran.err
    ran = thaw("bench", "kv", "--model", "M", "--dir", "files", "--engine-arg", 'hf_overrides={"rope": 1}')
    assert ran.code == 0 and started.asked[-1][1]["tokens"] == (1024, 2048, 4096, 8192)


def test_no_tokenizer(thaw, model, engines):
    started = engines()
    (model / "tokenizer.json").unlink()
    assert thaw("bench", "kv", "--model", "M", "--dir", "files", "--tokens", 1024).code == 0
    assert started.asked[0][1]["engine_args"]["skip_tokenizer_init"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nowhere"], 6, "no model directory 'nowhere'"),
        (["--model", "files"], 6, "config.json' cannot be read"),
        (["--model", "M", "--dir", "nowhere"], 6, "no directory 'nowhere'"),
        (["--model", "M", "--tokens", "0"], 2, "--tokens"),
        (["--model", "M", "--tokens", "4090"], 2, "4090 tokens and an answer of 16 are more than the 4096"),
        (["--model", "M", "--tokens", "512", "--engine-arg", "max_model_len=512"], 2, "max_model_len=N"),
        (["--model", "M", "--engine-arg", "x"], 2, "KEY=VALUE"),
    ],
)
def test_wrong_options(thaw, model, engines, arguments, code, says):
    started = engines()
    ran = thaw("bench", "kv", *arguments)
    assert ran.code == code and says in ran.err and not started.asked


def test_config_without_a_vocabulary(thaw, model, engines):
    engines()
    (model / "config.json").write_text("[]")
    ran = thaw("bench", "kv", "--model", "M")
    assert ran.code == 2 and "no vocab_size" in ran.err


def test_limits_with_a_gpu(thaw, model, engines, monkeypatch):
    """Of the same run: the link, and writes to where the files are."""
    started = engines()

    def limit(work, directory=None):
        extra = {"directory": str(directory)} if directory else {}
        return Outcome([Record(work, "limit", "route", 10**9, [0.1], "warm", False, None, None, extra)])

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ceilings, "link", lambda work, settings, say: limit(work))
    monkeypatch.setattr(ceilings, "on_memory", lambda directory: False)
    monkeypatch.setattr(ceilings, "measure", lambda works, places, settings, say: limit(works[0], places[0]))
    ran = thaw("bench", "kv", "--model", "M", "--tokens", 1024, "--dir", "files", "--json")
    assert ran.code == 0, ran.err
    found = {record["work"]: record for record in ran.document["records"]}
    assert {"h2d", "d2h", "disk-write"} < set(found) and found["ttft-cold"]["route"] == "graphs"
    assert found["kv-restore"]["of_limit"] == pytest.approx(1024 * SIZE / 0.06 / 1e10, abs=1e-4)
    assert found["kv-freeze"]["of_limit"] == pytest.approx(1024 * SIZE / 0.15 / 1e10, abs=1e-4)
    assert not started.asked[0][1]["engine_args"]["enforce_eager"]


def test_an_error_of_the_engine_core_is_looked_up():
    """The process that started the core says only that there was one."""
    said = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    log = f"(EngineCore pid=5) ERROR 11-24 [core.py:9] ValueError: no room for one block\nTraceback\n{said}\n"
    found = kv.failure("the engine that freezes", said, log)
    assert str(found) == "the engine that freezes: ValueError: no room for one block"
    assert str(kv.failure("the engine that freezes", said, said)) == f"the engine that freezes: {said}"
    ours = kv.failure("the engine that thaws", "MismatchError: another model", "")
    assert type(ours).__name__ == "MismatchError" and str(ours) == "the engine that thaws: another model"
    assert type(kv.failure("it", "ended with signal SIGKILL", "")) is ChildError


def test_prompts_are_the_same_everywhere():
    assert prompt(50, 5000) == prompt(50, 5000) and len(set(prompt(50, 5000))) > 40
    assert prompt(50, 5000) != prompt(50, 5000, "warm")
    assert min(prompt(2000, 5000)) >= 256 and min(prompt(2000, 300)) < 50


def test_pages_that_differ(monkeypatch):
    files = {"a": {1: b"x", 2: b"y"}, "b": {2: b"y", 1: b"x"}, "c": {1: b"x", 2: b"z"}, "d": {1: b"x"}}
    monkeypatch.setattr(kv_pages, "_ranks", lambda path: 2)
    monkeypatch.setattr(kv_pages, "pages_by_address", lambda path, rank: files[path] if rank else {3: b"same"})
    assert kv_pages.difference("a", "b") is None
    assert kv_pages.difference("a", "c") == "1 of 3 pages"
    assert kv_pages.difference("a", "d") == "1 pages are in one file only"


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_engines(thaw, tmp_path, cpu, forked_engines, monkeypatch):
    from tests.engines.vllm.models import KINDS

    (tmp_path / "files").mkdir()
    model = KINDS["tied"](tmp_path / "model")
    original = kv.run

    def keeping(task, request, say):
        answer = original(task, request, say)
        (folder,) = (tmp_path / "files").iterdir()
        shutil.copytree(folder, tmp_path / task)
        return answer

    monkeypatch.setattr(kv, "run", keeping)
    arguments = ("--tokens", 300, "--tokens", 160, "--runs", 2, "--dir", "files", "--engine-arg", "block_size=32")
    ran = thaw("bench", "kv", "--model", model, *arguments, "--json")
    assert ran.code == 0, ran.err
    found = ran.document["records"]
    assert len(found) == 12 and all(len(r["seconds"]) == 2 for r in found)
    assert {r["equal"] for r in found if r["system"] == "thaw"} == {True}
    assert {(r["tokens"], r["cached"]) for r in found if "cached" in r} == {(300, 288), (160, 128)}
    assert not list((tmp_path / "files").iterdir())
    long, short = (tmp_path / "kv-thaw" / f"{tokens}.thawkv" for tokens in (300, 160))
    assert sorted(path.name for path in long.parent.iterdir()) == [short.name, long.name]
    one = kv_pages.pages_by_address(long)
    assert len(one) == len(set(one.values())) == 9 * 2  # blocks, layers
    assert kv_pages.difference(long, long) is None
    assert kv_pages.difference(long, short) == f"{(9 + 5) * 2} pages are in one file only"


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_engine_that_cannot_start(tmp_path, cpu, forked_engines):
    """The engine core's own words, not those of the process that started it."""
    from tests.engines.vllm.models import KINDS

    model = KINDS["tied"](tmp_path / "model")
    request = {
        "model": str(model),
        "engine_args": {"enforce_eager": True, "max_model_len": 256, "num_gpu_blocks_override": 1},
        "tokens": [100],
        "vocabulary": 512,
        "sockets": str(tmp_path),
    }
    with pytest.raises(ThawError, match=r"^the engine that freezes: ValueError: ") as caught:
        kv.run("kv-freeze", request, lambda line: None)
    assert "\n" not in str(caught.value)
