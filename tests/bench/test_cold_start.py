"""Starts of an engine that is not there: ``fresh.run`` is replaced."""

import json
import os
import signal
from pathlib import Path

import pytest
from tests.cli.ranks import freeze_set

from thaw_vllm.bench import cold_start
from thaw_vllm.caches.places import UNSET
from thaw_vllm.engines.vllm import one_server
from thaw_vllm.engines.vllm.fast_start import CACHES, FastStart
from thaw_vllm.errors import ThawError, UsageError


class Engine:
    """Answers like ``fresh.run``; loaders in ``failing`` raise, those in ``different`` give another token.

    With ``reporting`` each start also writes what a real one does, its imports a second longer each time.
    """

    def __init__(self, failing=(), different=(), reporting=False):
        self.failing, self.different, self.reporting, self.asked = failing, different, reporting, []
        self.environments, self.zygotes, self.args, self.caches = [], [], [], []

    def __call__(
        self,
        action,
        *,
        model,
        snapshot,
        engine_args,
        questions,
        max_tokens,
        environment,
        zygote=None,
        log,
        removed=(),
        caches=None,
    ):
        self.zygotes.append(zygote)
        self.caches.append((caches, tuple(removed)))
        log.write_text(f"started {engine_args}")
        self.args.append(engine_args)
        name = "snapshot" if snapshot is not None else engine_args.get("load_format", "default")
        self.asked.append((name, engine_args["enforce_eager"]))
        self.environments.append(environment)
        if name in self.failing:
            raise UsageError(f"the process failed: {name}\nis not known")
        if self.reporting:
            self.report(Path(environment["THAW_START_REPORT"]))
        seconds = {"process": 1.0, "imports": 20.0, "engine": 8.0, "first_token": 0.5, "answers": 3.0, "total": 40.0}
        if name != "runai_streamer":  # vLLM's log does not tell for all of them
            seconds["weights"] = 2.5
        reports = [{"verified": "wordsum", "seconds": {"total": 2.5}}] if name in ("snapshot", "thaw") else []
        tokens = [1, 2, 4 if name in self.different else 3]
        return {"seconds": seconds, "reports": reports, "outputs": [{"tokens": tokens, "logprobs": [], "text": ""}]}

    def report(self, directory):
        directory.mkdir()
        assert not any(Path(path).exists() for name, path in self.environments[-1].items() if "CACHE" in name)
        common = {"pid": 7, "parent": 1, "name": "MainProcess", "created": 100}
        until = 104 + len(self.asked)
        phases = [("process", 100, 101), ("imports", 101, until), ("config", until, until + 2)]
        phases.append(("first token", until + 2, until + 3))
        lines = (json.dumps(common | {"phase": phase, "begin": b, "end": e}) for phase, b, e in phases)
        (directory / "7.jsonl").write_text("\n".join(lines))


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
    monkeypatch.setattr(cold_start, "has_gpu", lambda environment: False)
    for name in cold_start.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    return use


def test_every_loader_in_every_mode(thaw, model, engine, tmp_path):
    started = engine(failing=("thaw",))
    arguments = ("--model", model, "--snapshot", tmp_path / "W.thaw", "--runs", 2, "--json", "--record")
    ran = thaw("bench", "cold-start", *arguments)
    assert ran.code == 0, ran.err
    names = ["default", "snapshot", "fastsafetensors", "instanttensor", "runai_streamer"]
    assert sorted(name for name, eager in started.asked if eager and name != "thaw") == sorted(names * 2)
    assert [n for n, eager in started.asked if not eager][:3] == ["default", "default", "snapshot"]  # one not counted
    assert "start-graphs, not counted, so that kernels are compiled, vllm (default-loader): 40.0 s" in ran.err
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


def test_phases_of_every_start(thaw, model, engine, tmp_path):
    started = engine(reporting=True)
    arguments = ("bench", "cold-start", "--model", model, "--mode", "eager", "--runs", 2, "--loader", "default-loader")
    found = thaw(*arguments, "--json", "--reports", tmp_path / "kept").document["records"][0]
    assert found["work"] == "start-eager"
    assert found["phases"] == {"process": [1, 1], "imports": [4, 5], "config": [2, 2], "first token": [1, 1]}
    assert found["asked"]["imports"] == [20, 20]
    names = sorted(path.name.partition("-")[2] for path in (tmp_path / "kept").iterdir())
    assert names == [f"start-eager-default-loader-{n}.{kind}" for n in (1, 2) for kind in ("html", "json", "log")]
    first = next((tmp_path / "kept").glob("*-1.json"))
    assert json.loads(first.read_text())["total"] == 8
    assert [set(e) for e in started.environments] == [{*cold_start.DEFAULTS, "THAW_START_REPORT"}] * 2
    assert not Path(started.environments[0]["THAW_START_REPORT"]).exists()

    ran = thaw(*arguments)
    title, _, rows = ran.out.partition("start-eager, seconds of the wall clock by phase")
    lines = [line.split() for line in rows.strip().splitlines()]
    assert lines[0] == ["PHASE", "vllm:", "default-loader"]
    assert lines[2] == ["imports", "6.50", "(6.00–7.00)"] and lines[5] == ["total", "10.50", "(10.00–11.00)"]
    assert "SECONDS" in title and "29.50" in title


@pytest.fixture
def zygote(monkeypatch):
    """What happened to a zygote that is not there."""
    happened = []
    monkeypatch.setattr(cold_start, "start", lambda where, **options: happened.append((where.name, options)))
    monkeypatch.setattr(cold_start, "ask", lambda where, what: happened.append((where.name, what)))
    return happened


def test_forks_of_a_zygote(thaw, model, engine, zygote):
    started = engine()
    arguments = ("--mode", "eager", "--zygote", "--loader", "default-loader", "--loader", "default-loader-zygote")
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert ran.code == 0, ran.err
    assert started.zygotes == [None, cold_start.ZYGOTE]
    (name, options), stopped = zygote
    assert name == cold_start.ZYGOTE and stopped == (name, "stop") and options["models"] == [str(model)]
    assert options["environment"] == {"VLLM_LOGGING_LEVEL": "INFO"} | cold_start.DEFAULTS
    found = [(r["system"], r["route"]) for r in ran.document["records"] if r["work"] == "start-eager"]
    assert found == [("vllm", "default-loader"), ("thaw", "default-loader-zygote")]


def test_with_the_preset(thaw, model, engine, zygote, monkeypatch):
    preset = FastStart({"cudagraph_capture_sizes": [1]}, {"VLLM_ENABLE_STARTUP_PLAN": "1"}, [])
    given = []
    monkeypatch.setattr(cold_start, "fast_start", lambda args, environment: given.append(dict(args)) or preset)
    monkeypatch.setattr(cold_start, "has_gpu", lambda environment: True)
    started = engine()
    routes = ["default-loader", "default-loader-fast-start", "checkpoint-zygote-fast-start"]
    arguments = ["--mode", "graphs", "--zygote", "--fast-start", *(x for route in routes for x in ("--loader", route))]
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert ran.code == 0, ran.err
    starts = [(r["system"], r["route"]) for r in ran.document["records"] if r["work"] == "start-graphs"]
    assert starts == list(zip(("vllm", "thaw", "thaw"), routes, strict=True))
    # Two that are not counted come first: of each kind of kernels the one that is forked, or else the first.
    assert started.zygotes == [cold_start.ZYGOTE, None, None, None, cold_start.ZYGOTE]
    assert [e.get("VLLM_ENABLE_STARTUP_PLAN") for e in started.environments] == ["1", None, None, "1", "1"]
    assert [args.get("cudagraph_capture_sizes") for args in started.args] == [[1], None, None, [1], [1]]
    common = {"enforce_eager": False, "max_model_len": 2048}
    assert given == [common | {"load_format": "thaw"}, common, common | {"load_format": "thaw"}]


@pytest.mark.parametrize(("gpu", "mode", "starts"), [(True, "eager", 3), (False, "eager", 2), (False, "graphs", 3)])
def test_a_start_that_compiles_is_not_counted(gpu, mode, starts, thaw, model, engine, monkeypatch, tmp_path):
    monkeypatch.setattr(cold_start, "has_gpu", lambda environment: gpu)
    started = engine(reporting=True)
    arguments = ("--mode", mode, "--loader", "default-loader", "--runs", 2, "--reports", tmp_path / "kept")
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert ran.code == 0, ran.err
    assert len(started.asked) == starts
    assert [len(record["seconds"]) for record in ran.document["records"]] == [2, 2]
    kept = tmp_path / "kept"
    starts_kept = sorted(path.stem.rpartition("-")[2] for path in kept.glob("*.json"))
    assert starts_kept == ["0", "1", "2"][3 - starts :], "what is not counted has the number 0"
    assert sorted(path.stem for path in kept.glob("*.log")) == sorted(path.stem for path in kept.glob("*.json"))
    assert all("started" in path.read_text() for path in kept.glob("*.log"))


def test_another_compiles_where_the_first_cannot(thaw, model, engine):
    started = engine(failing=("default",))
    arguments = ("--mode", "graphs", "--loader", "default-loader", "--loader", "checkpoint", "--runs", 2)
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert ran.code == 0, ran.err
    assert [name for name, _ in started.asked] == ["default", "thaw", "thaw", "thaw"]
    assert [m["route"] for m in ran.document["missed"]] == ["default-loader"]


class TestInterrupted:
    @pytest.fixture
    def ran(self, thaw, model, engine, zygote, monkeypatch, request):
        """Of two rounds of two loaders in two modes, interrupted in the second one's second start."""
        started = engine()

        def run(*args, **options):
            if len(started.asked) == 3:
                request.param()
            return started(*args, **options)

        monkeypatch.setattr(cold_start.fresh, "run", run)
        loaders = ("--loader", "default-loader", "--loader", "checkpoint-zygote")
        arguments = ("--model", model, "--runs", 2, "--zygote", *loaders, "--record", "--json")
        found = thaw("bench", "cold-start", *arguments)
        assert len(started.asked) == 3
        return found

    @staticmethod
    def _interrupt():
        raise KeyboardInterrupt

    @staticmethod
    def _terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    @pytest.mark.parametrize("ran", [_interrupt, _terminate], indirect=True, ids=["SIGINT", "SIGTERM"])
    def test_what_there_was_is_kept(self, ran, zygote, tmp_path):
        assert ran.code == 130 and ran.document["interrupted"], ran.err
        starts = [r for r in ran.document["records"] if r["work"] == "start-eager"]
        assert {r["route"]: len(r["seconds"]) for r in starts} == {"default-loader": 1, "checkpoint-zygote": 2}
        (file,) = (tmp_path / "benchmarks" / "results").iterdir()
        assert len(file.read_text().splitlines()) == len(ran.document["records"])
        assert zygote[-1] == (cold_start.ZYGOTE, "stop")

    def test_the_signal_is_left_as_it_was(self, thaw, model, engine):
        engine()
        before = signal.getsignal(signal.SIGTERM)
        assert thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--loader", "checkpoint").code == 0
        assert signal.getsignal(signal.SIGTERM) is before


def test_the_preset_needs_a_gpu(thaw, model, engine):
    started = engine()
    ran = thaw("bench", "cold-start", "--model", model, "--fast-start")
    assert ran.code == 2 and "changes nothing without a GPU" in ran.err and started.asked == []


@pytest.mark.parametrize(
    ("loader", "option"), [("snapshot-zygote", "--zygote"), ("checkpoint-fast-start", "--fast-start")]
)
def test_a_loader_that_needs_an_option(thaw, model, engine, loader, option):
    engine()
    ran = thaw("bench", "cold-start", "--model", model, "--loader", loader)
    assert ran.code == 2 and ran.err == f"error: the loader {loader!r} needs {option}\n"


def test_a_zygote_is_stopped_after_an_error(thaw, model, engine, zygote, monkeypatch):
    engine()
    monkeypatch.setattr(cold_start.fresh, "run", lambda *args, **options: 1 / 0)
    ran = thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--zygote", "--loader", "default-loader")
    assert ran.code == 1 and zygote[-1] == (cold_start.ZYGOTE, "stop")


def test_no_zygote_with_empty_caches(thaw, model, engine, zygote):
    engine()
    ran = thaw("bench", "cold-start", "--model", model, "--zygote", "--caches", "cold")
    assert ran.code == 2 and "leave out --zygote or --caches cold" in ran.err and not zygote


def test_what_the_caller_has_chosen_stays(thaw, model, engine, monkeypatch):
    started = engine()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--loader", "checkpoint")
    assert [set(e) for e in started.environments] == [{"VLLM_NO_USAGE_STATS", "THAW_START_REPORT"}]


def test_servers(thaw, model, engine, zygote, tmp_path, monkeypatch):
    engine()
    asked = []

    def run(*, engine_args, zygote, **options):
        asked.append((engine_args, zygote, options["question"]))
        if engine_args.get("load_format") == "thaw" and zygote is None:
            raise UsageError("the server did not come up: why")
        return {"seconds": {"process": 4.0, "answers": 1.0, "total": 6.0}, "outputs": [{"tokens": [1]}], "reports": []}

    monkeypatch.setattr(cold_start.one_server, "run", run)
    snapshot = tmp_path / "W.thaw"
    loaders = [x for name in ("default-loader", "snapshot", "snapshot-zygote") for x in ("--loader", name)]
    arguments = ("--model", model, "--snapshot", snapshot, "--mode", "server", "--zygote", *loaders)
    ran = thaw("bench", "cold-start", *arguments, "--json")
    assert ran.code == 0, ran.err
    thawing = {"load_format": "thaw", "model_loader_extra_config": {"snapshot": str(snapshot)}}
    common = {"enforce_eager": True, "max_model_len": 2048}
    assert [(args, name) for args, name, _ in asked] == [
        (common, None),
        (common | thawing, None),
        (common | thawing, cold_start.ZYGOTE),
    ]
    found = {(r["work"], r["route"]): r["seconds"] for r in ran.document["records"]}
    work = cold_start.HEALTHY_CPU
    assert found == {(work, "default-loader"): [4.0], (work, "snapshot-zygote"): [4.0]}
    assert ran.document["missed"][0]["why"] == "the server did not come up: why"


def test_a_server_that_does_not_come_up(tmp_path, monkeypatch):
    monkeypatch.setattr(one_server, "MODULE", "no_such_module_anywhere")
    asked = {"model": "M", "engine_args": {}, "question": [1], "max_tokens": 1, "environment": {}, "zygote": None}
    with pytest.raises(ThawError, match=r"did not come up: .*No module named no_such_module_anywhere"):
        one_server.run(**asked, log=tmp_path / "log")


def test_the_log_of_a_start_that_failed_is_kept(thaw, model, engine, tmp_path):
    engine(failing=("default",))
    arguments = ("--mode", "eager", "--loader", "default-loader", "--reports", tmp_path / "kept")
    thaw("bench", "cold-start", "--model", model, *arguments)
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.endswith("-start-eager-default-loader-1.log") and "started" in kept.read_text()


@pytest.mark.parametrize(
    ("routes", "equal"),
    [
        (["default-loader", "checkpoint-fast-start"], [True, None]),
        (["default-loader", "default-loader-fast-start", "checkpoint-fast-start"], [True, True, True]),
        (["checkpoint", "checkpoint-fast-start"], [None, None]),
        (["default-loader-fast-start", "instanttensor"], [True, None]),
        (["checkpoint", "default-loader-fast-start", "instanttensor"], [None, True, True]),
    ],
)
def test_only_what_is_started_alike_is_compared(routes, equal, thaw, model, engine, monkeypatch):
    """As if graphs of other sizes had rounded to another token."""
    started = engine()

    def run(*args, engine_args, **options):
        answer = started(*args, engine_args=engine_args, **options)
        if "cudagraph_capture_sizes" in engine_args:
            answer["outputs"][0]["tokens"] = [7]
        return answer

    preset = FastStart({"cudagraph_capture_sizes": [1]}, {}, [])
    monkeypatch.setattr(cold_start, "fast_start", lambda args, environment: preset)
    monkeypatch.setattr(cold_start, "has_gpu", lambda environment: True)
    monkeypatch.setattr(cold_start.fresh, "run", run)
    arguments = ["--mode", "graphs", "--fast-start", *(x for route in routes for x in ("--loader", route))]
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert [r["equal"] for r in ran.document["records"] if r["work"] == "start-graphs"] == equal


def test_a_directory_for_logs_that_cannot_be_written_to(thaw, model, engine):
    started = engine()
    ran = thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--reports", "/proc")
    assert ran.code == 6 and "give another --reports" in ran.err and not started.asked


def test_starts_with_empty_caches(thaw, model, engine):
    started = engine(reporting=True)
    arguments = ("--mode", "graphs", "--loader", "checkpoint", "--caches", "cold", "--runs", 2)
    ran = thaw("bench", "cold-start", "--model", model, *arguments, "--json")
    assert [r["work"] for r in ran.document["records"]] == ["start-graphs-cold", "vllm-load-weights"]
    assert ran.document["records"][1]["start"] == "start-graphs-cold"
    places = [{name: e[name] for name in CACHES} for e in started.environments]
    assert len({path for place in places for path in place.values()}) == 2 * len(CACHES)


class Compiling(Engine):
    """Leaves what it has compiled, as an engine that is given no file; says what it found there."""

    def __call__(self, action, *, environment, caches=None, **options):
        answer = super().__call__(action, environment=environment, caches=caches, **options)
        place = Path(environment["VLLM_CACHE_ROOT"]) / "modelinfos"
        self.there.append(sorted(path.name for path in place.glob("*")))
        place.mkdir(parents=True)
        (place / "llama.json").write_text("{}")
        counts = {"aot_compiles": int(caches is None)}
        return answer | {"compiled": [{"state": "new" if caches is None else "found", "counts": counts}]}

    there: list[list[str]]


@pytest.fixture
def compiling(engine, monkeypatch, tmp_path):
    engine()
    found = Compiling()
    found.there = []
    monkeypatch.setattr(cold_start.fresh, "run", found)
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    return found


FROM_A_FILE = ("--mode", "graphs", "--caches", "file")


def test_starts_with_caches_from_a_file(thaw, model, compiling, zygote, tmp_path):
    arguments = (*FROM_A_FILE, "--snapshot", tmp_path / "W.thaw", "--runs", 2, "--zygote", "--json")
    ran = thaw("bench", "cold-start", "--model", model, *arguments)
    assert ran.code == 0, ran.err
    found = {(r["work"], r["route"]): r for r in ran.document["records"] if r["work"] != "vllm-load-weights"}
    routes = ["snapshot", "checkpoint", "snapshot-zygote", "checkpoint-zygote"]
    new = [(cold_start.NEW, route) for route in routes]
    first_of_all = (cold_start.NEW, "snapshot-nothing-compiled")
    assert list(found) == [first_of_all, *new]
    cold, first = found[first_of_all], found[cold_start.NEW, "snapshot"]
    assert cold["equal"] is None and cold["files"] == 1 and cold["packed_bytes"] > 0
    assert all(found[one]["equal"] is True and len(found[one]["seconds"]) == 2 for one in new)
    assert [one[0]["state"] for one in first["compiled"]] == ["found", "found"]
    (packing, *starts) = compiling.caches
    assert packing[0] is None and set(UNSET) <= set(packing[1])
    assert len(starts) == 8 and len({file for file, _ in starts}) == 1 and starts[0][0].endswith(".thawcaches")
    assert compiling.there == [[]] * 9, "each finds its places empty"
    cleared = [e["VLLM_CACHE_ROOT"] for e in compiling.environments]
    assert len(set(cleared[1:])) == 1 and cleared[0] not in cleared[1:], "packed at one place, used at another"


def test_other_tokens_than_those_of_the_start_that_was_packed(thaw, model, compiling):
    real = compiling.__call__

    def differs(*args, **options):
        answer = real(*args, **options)
        if options.get("caches") is not None:
            answer["outputs"][0]["tokens"] = [9]
        return answer

    cold_start.fresh.run = differs
    ran = thaw("bench", "cold-start", "--model", model, *FROM_A_FILE, "--loader", "checkpoint")
    assert ran.code == 1 and f"NOT EQUAL: {cold_start.NEW}, thaw (checkpoint)" in ran.err


def test_what_was_measured_before_an_interruption_is_kept(thaw, model, compiling, zygote):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    real = compiling.__call__
    cold_start.fresh.run = lambda *args, **options: (
        interrupted() if options.get("caches") is not None else real(*args, **options)
    )
    ran = thaw("bench", "cold-start", "--model", model, *FROM_A_FILE, "--loader", "checkpoint", "--json")
    assert ran.code == 130
    (kept,) = (r for r in json.loads(ran.out)["records"] if r["work"] == cold_start.NEW)
    assert kept["route"] == "checkpoint-nothing-compiled"


def test_what_cannot_be_packed_is_told(thaw, model, compiling):
    compiling.failing = ("thaw",)
    ran = thaw("bench", "cold-start", "--model", model, *FROM_A_FILE, "--loader", "checkpoint", "--json")
    assert ran.document["records"] == [] and ran.code != 0
    assert ran.document["missed"][0]["why"] == "the process failed: thaw is not known"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--mode", "eager", "--caches", "file"), "measures --mode graphs alone"),
        ((*FROM_A_FILE, "--loader", "default-loader"), "is for thaw's loaders"),
    ],
)
def test_what_a_file_is_not_for(thaw, model, compiling, arguments, told):
    ran = thaw("bench", "cold-start", "--model", model, *arguments)
    assert ran.code == 2 and told in ran.err


def test_a_zygote_that_would_find_kernels(thaw, model, compiling, zygote, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    ran = thaw("bench", "cold-start", "--model", model, *FROM_A_FILE, "--zygote")
    assert ran.code == 2 and "by TRITON_CACHE_DIR; unset it" in ran.err and not zygote


def test_reports_that_cannot_be_kept(thaw, model, engine, tmp_path):
    engine(reporting=True)
    (tmp_path / "file").touch()
    ran = thaw("bench", "cold-start", "--model", model, "--mode", "eager", "--reports", tmp_path / "file")
    assert ran.code == 6 and "give another --reports" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "model", "--caches", "tepid"], 2, "there is no kind of caches 'tepid'; there are warm, cold"),
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
