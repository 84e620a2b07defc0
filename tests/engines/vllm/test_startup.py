"""What a start's processes write of themselves: without an engine, and one real start."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw_vllm.engines.vllm import fresh, start_report, startup, versions
from thaw_vllm.engines.vllm.start_report import CORE, FRONT, PHASES, WORKER

pytestmark = pytest.mark.vllm


def written(directory: Path, pid: int | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{pid or os.getpid()}.jsonl").read_text().splitlines()]


@pytest.fixture
def recorder(tmp_path: Path) -> startup.Recorder:
    return startup.Recorder(str(tmp_path / "start"))


class Base:
    def load(self, times: int = 1) -> str:
        """Loads."""
        if times < 0:
            raise ValueError("backwards")
        return "loaded" * times

    @staticmethod
    def make(name: str) -> str:
        return name

    async def later(self) -> None: ...

    def step(self) -> tuple[dict[int, Any] | None, bool]:
        return self.answer

    answer: tuple[dict[int, Any] | None, bool] = ({}, False)

    def request(self) -> None: ...

    def import_model(self) -> str:
        return self.importing()

    importing = staticmethod(str)


class Below(Base):
    def load(self, times: int = 1) -> str:
        return super().load(times) + " below"


class Apart(Base):
    """Inherits everything."""


@contextlib.contextmanager
def enclosing(value: int) -> Iterator[int]:
    yield value


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch, recorder: startup.Recorder) -> Iterator[Any]:
    """A module of the classes above, with a start's hooks installed; classes are as before afterwards."""
    module = types.ModuleType("vllm.made_up")
    module.Base, module.enclosing = Base, enclosing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = [
        (versions.SPAN, "weights", "Base", "load"),
        (versions.SPAN, "worker process", "Base", "make"),
        (versions.SPAN, "config", "Base", "later"),
        (versions.SPAN, "config", "Base", "lost"),
        (versions.SPAN, "config", "Lost", "lost"),
        (versions.CONTEXT, "compile", "", "enclosing"),
        (versions.LOADING, "model loading", "Base", "import_model"),
        (versions.REQUEST, "first token", "Base", "request"),
        (versions.STEP, "first token", "Base", "step"),
    ]
    hooks = [(kind, phase, module.__name__, owner, name) for kind, phase, owner, name in names]
    hooks.append((versions.SPAN, "config", "vllm.never_imported", "Base", "load"))
    monkeypatch.setattr(versions, "_START", tuple(hooks))
    before = {owner: dict(vars(owner)) for owner in (Base, Below, Apart)}
    startup.install(recorder)
    yield module
    for owner, names_then in before.items():
        for name, value in names_then.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


class TestHooks:
    def test_calls_are_timed_and_answer_as_ever(self, looked_at: Any, recorder: startup.Recorder):
        assert Below().load(2) == "loadedloaded below" and Apart().load() == "loaded"
        assert Base.make("a") == "a" and Base().make("b") == "b"
        with pytest.raises(ValueError, match="backwards"):
            Base().load(-1)
        with looked_at.enclosing(3) as given:
            assert given == 3
        with pytest.raises(KeyError), looked_at.enclosing(3):
            raise KeyError
        found = written(Path(recorder.directory))
        phases = [event["phase"] for event in found]
        assert phases.count("weights") == 4 and phases.count("worker process") == 2 and phases.count("compile") == 2
        assert all(event["begin"] <= event["end"] and event["pid"] == os.getpid() for event in found)
        assert Base.load.__doc__ == "Loads." and Base.load.__qualname__ == "Base.load"

    def test_a_second_time_changes_nothing(self, looked_at: Any, recorder: startup.Recorder):
        functions = [Base.load, Below.load, Base.make, looked_at.enclosing]
        startup.install(recorder)
        assert functions == [Base.load, Below.load, Base.make, looked_at.enclosing]

    def test_what_comes_with_a_model_is_looked_at_once_it_is_there(
        self, looked_at: Any, recorder: startup.Recorder, monkeypatch: pytest.MonkeyPatch
    ):
        model = types.ModuleType("vllm.model")
        model.compiling = enclosing  # type: ignore[attr-defined]
        compiling = (versions.CONTEXT, "compile", model.__name__, "", "compiling")
        monkeypatch.setattr(versions, "_START", (*versions._START, compiling))
        importing = staticmethod(lambda: monkeypatch.setitem(sys.modules, model.__name__, model))
        monkeypatch.setattr(Base, "importing", importing)
        Base().import_model()
        with model.compiling(3) as given:  # type: ignore[attr-defined]
            assert given == 3
        assert [event["phase"] for event in written(Path(recorder.directory))] == ["model loading", "compile"]

    def test_what_waits_is_left_alone(self, looked_at: Any):
        assert not hasattr(Base.later, startup._MARK) and "load" not in vars(Apart)

    def test_the_first_token_is_that_of_the_first_request(self, looked_at: Any, recorder: startup.Recorder):
        core, some = Base(), types.SimpleNamespace(outputs=[1])
        core.request()
        for answer in (({}, False), (None, False), ({0: types.SimpleNamespace(outputs=[])}, True), "of another shape"):
            core.answer = answer  # type: ignore[assignment]
            assert core.step() is answer
        assert not recorder.done
        core.answer = ({0: some}, True)
        core.request()
        core.step()
        core.step()
        Base().load()
        assert [event["phase"] for event in written(Path(recorder.directory))] == ["first token"] and recorder.done


class TestRecorder:
    def test_what_came_before_the_plugin(self, recorder: startup.Recorder):
        recorder.begin()
        process, imports = written(Path(recorder.directory))
        assert (process["phase"], imports["phase"]) == ("process", "imports")
        assert process["begin"] == process["created"] <= process["end"] == imports["begin"] < imports["end"]
        assert imports["end"] <= startup.now() and imports["parent"] == os.getppid()

    def test_a_forked_process_has_a_file_of_its_own(self, recorder: startup.Recorder):
        recorder.begin()
        recorder.done = True  # the parent's business
        pid = os.fork()
        if pid == 0:
            try:
                begun = recorder.enter()
                recorder.span("weights", begun)
                recorder.under_way("engine init", startup.now())  # the plugin was loaded elsewhere
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        process, weights = written(Path(recorder.directory), pid)
        assert (process["phase"], weights["phase"], process["parent"]) == ("process", "weights", os.getpid())
        assert process["begin"] == process["created"] and process["end"] == weights["begin"]
        assert len(written(Path(recorder.directory))) == 2

    def test_a_worker_says_what_it_compiled(self, recorder: startup.Recorder, monkeypatch: pytest.MonkeyPatch):
        told: dict[str, object] = {"parts": []}
        module = SimpleNamespace(report=lambda: told or None)
        monkeypatch.setitem(sys.modules, f"{startup.__package__}.compiled", module)
        recorder.begin()
        recorder.span("weights", startup.now())
        assert start_report.read(recorder.directory).compiled == (), "nothing is compiled by then"
        for kernels in (1, 2):
            told["kernels"] = kernels
            recorder.span("graphs", startup.now())
            assert start_report.read(recorder.directory).compiled == ({"parts": [], "kernels": kernels},)

    def test_a_forked_process_says_what_it_imports(self, recorder: startup.Recorder, tmp_path: Path):
        (tmp_path / "imported_late.py").touch()
        recorder.begin()
        pid = os.fork()
        if pid == 0:
            try:
                begun = recorder.enter()
                recorder.span("device", begun)
                sys.path.insert(0, str(tmp_path))
                importlib.import_module("imported_late")
                recorder.span("model init", begun)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        recorder.span("config", startup.now())
        found = start_report.read(recorder.directory)
        assert [process.imported for process in found.processes] == [(), ("imported_late",)]
        assert found.to_json()["processes"][1]["imported"] == ["imported_late"] and found.skipped == 0
        assert len(os.listdir(recorder.directory)) == 3  # a file of each process, and the modules of one

    def test_a_plugin_loaded_in_a_forked_process_has_no_imports(
        self, recorder: startup.Recorder, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(startup, "interpreter_began", lambda: recorder._created - 5)
        recorder.begin()
        assert [event["phase"] for event in written(Path(recorder.directory))] == ["process"]

    def test_a_system_that_does_not_say_when_processes_began(
        self, recorder: startup.Recorder, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(startup, "created", lambda: None)
        made = startup.Recorder(recorder.directory)
        made.begin()
        process, imports = written(Path(recorder.directory))
        assert process["created"] == process["begin"] == process["end"] == imports["begin"]

    def test_what_cannot_be_written_is_said_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        (tmp_path / "file").touch()
        made = startup.Recorder(str(tmp_path / "file" / "start"))
        with caplog.at_level(logging.WARNING):
            made.begin()
            made.span("weights", made.enter())
        assert made.done and len(caplog.records) == 1 and "THAW_START_REPORT" in caplog.text

    def test_a_vllm_of_another_shape_starts_all_the_same(
        self, recorder: startup.Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setattr(versions, "start_hooks", lambda: [(versions.SPAN, "weights", Base, "not there")])
        monkeypatch.setattr(startup, "_recorder", recorder)
        startup.plugin_loaded()
        assert "THAW_START_REPORT: no report" in caplog.text

    def test_a_directory_that_has_gone(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
        def gone() -> str:
            raise FileNotFoundError("the current directory")

        monkeypatch.setenv(startup.VARIABLE, "start")
        monkeypatch.setattr(os, "getcwd", gone)
        startup.begin()
        assert startup._recorder is None and "the current directory" in caplog.text

    def test_without_the_variable_nothing_is_made(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv(startup.VARIABLE, raising=False)
        startup.begin()
        startup.plugin_loaded()
        assert startup._recorder is None


def test_every_name_is_there_in_this_vllm_and_documented():
    documented = Path("docs/architecture.md").read_text()
    for _, _, module, _, _ in versions._START:
        importlib.import_module(module)
    hooks = versions.start_hooks()
    for _, phase, module, owner, name in versions._START:
        holder = getattr(sys.modules[module], owner) if owner else sys.modules[module]
        kin = [one for _, _, one, hooked in hooks if hooked == name]
        assert any(one is holder or (owner and issubclass(one, holder)) for one in kin), (module, owner, name)
        assert phase in PHASES
        if module.startswith("thaw_vllm."):
            continue  # no name of vLLM's
        assert re.search(rf"`[\w.]*\b{name}`", documented), name
        assert not owner or re.search(rf"`[\w.]*\b{owner}\b[\w.]*`", documented), owner


def test_a_real_start(checkpoints: Callable[[str], Path], tmp_path: Path):
    directory = tmp_path / "start"
    answer = fresh.run(
        "ask",
        model=str(checkpoints("tied")),
        snapshot=None,
        engine_args={"max_model_len": 256, "enforce_eager": True},
        questions=[list(range(5, 40))],
        max_tokens=2,
        environment={startup.VARIABLE: str(directory)},
    )
    found = start_report.read(directory)
    roles = [process.role for process in found.processes]
    assert roles[:2] == [FRONT, CORE] and found.first_token and found.skipped == 0
    of = {process.role: {span.phase for span in process.spans} for process in found.processes}
    assert of[FRONT] >= {"process", "imports", "plugin", "config", "front", "engine process"}
    assert of[CORE] >= {"engine process", "engine imports", "engine init", "first token"}
    worker = {"worker init", "device", "model loading", "model init", "weights", "post-processing", "profile"}
    assert of.get(WORKER, set()) | of[CORE] >= worker | {"KV cache", "warm-up"}
    assert sum(found.seconds.values()) == pytest.approx(found.total)
    assert found.seconds.get("other", 0.0) < 0.2 * found.total
    for process in found.processes:
        assert sum(span.self_seconds for span in process.spans) <= found.total - process.created + 0.02
    seconds = answer["seconds"]
    told = sum(seconds[name] for name in ("process", "imports", "engine", "first_token"))
    assert found.total == pytest.approx(told, rel=0.1, abs=0.5)
