"""Engines in forks of a zygote that has imported vLLM: fresh processes' answers, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm.forks import PARALLEL
from tests.zygote.running import COMMAND, Zygote, changed, made, until

from thaw_vllm.cli import serve
from thaw_vllm.engines.vllm import fresh, preimport, start_report, versions
from thaw_vllm.engines.vllm.command_line import options
from thaw_vllm.engines.vllm.fast_start import fast_start
from thaw_vllm.errors import UnsupportedError
from thaw_vllm.zygote import processes

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [list(range(5, 40)), list(range(100, 180))]
ARGS: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True}
ANEW = {"imports", "engine imports", "worker imports"}
ASK = """
import sys
{before}
from thaw_vllm.engines.vllm import ask
if __name__ == "__main__":
    {within}
    ask.main(*sys.argv[1:])
"""
USES_OPENMP = "import torch; torch.set_num_threads(2); x = torch.randn(1000, 1000); torch.relu(x @ x)"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One that has imported vLLM."""
    with made(preimport.__name__) as one:
        one.start(**fresh.READ_FROM_THE_LOG)
        yield one


@pytest.fixture(autouse=True)
def nothing_left(zygote: Zygote) -> Iterator[None]:
    """After each test the zygote is alone, and may be forked."""
    yield
    zygote.all_gone()
    until(lambda: not zygote.status()["programs"], "the zygote to take leave of its programs")
    status = zygote.status()
    assert status["unsound"] is None and status["engines_forked"]


@pytest.fixture(scope="module")
def asked(checkpoints: Callable[[str], Path]) -> dict[str, Any]:
    return {"model": str(checkpoints("untied")), "engine_args": ARGS, "questions": PROMPTS}


@pytest.fixture(scope="module")
def snapshot(zygote: Zygote, asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "weights.thaw"
    fresh.run("freeze", snapshot=path, zygote="default", environment=fresh.READ_FROM_THE_LOG, **asked)
    return path


@pytest.fixture(scope="module")
def started_anew(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, set[str]]:
    """What a fresh process answers, tokens and log-probabilities; and the phases of its start."""
    reports = tmp_path_factory.mktemp("anew") / "start"
    answer = fresh.run("ask", snapshot=None, environment={"THAW_START_REPORT": str(reports)}, **asked)
    return answer["outputs"], set(start_report.read(reports).seconds)


@pytest.fixture(scope="module")
def anew(started_anew: tuple[Any, set[str]]) -> Any:
    return started_anew[0]


@pytest.fixture
def program(zygote: Zygote, asked: dict[str, Any], tmp_path: Path):
    """``program(before, within)``: ``ask`` with these lines before it, in a fork; its log, outputs, imports anew."""

    def run(before: str = "", within: str = "pass", **environment: str) -> tuple[str, Any, set[str]]:
        (tmp_path / "program.py").write_text(ASK.format(before=before, within=within))
        request = asked | {"action": "ask", "snapshot": None, "max_tokens": 32, "kv": None, "started": time.time()}
        (tmp_path / "request.json").write_text(json.dumps(request))
        environment |= {"THAW_START_REPORT": str(tmp_path / "start")} | fresh.READ_FROM_THE_LOG
        files = [tmp_path / name for name in ("program.py", "request.json", "answer.json")]
        with (tmp_path / "log").open("w") as log:
            process = zygote.popen(*files, env=environment, stdout=log, stderr=log)
            assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
        outputs = json.loads((tmp_path / "answer.json").read_text())["outputs"]
        return (tmp_path / "log").read_text(), outputs, ANEW & set(start_report.read(tmp_path / "start").seconds)

    return run


@pytest.mark.parametrize("how", ["default", "snapshot"])
def test_answers_are_equal(how: str, zygote: Zygote, asked: dict, snapshot: Path, anew: Any, tmp_path: Path):
    reports = {"THAW_START_REPORT": str(tmp_path / "start")}
    path = snapshot if how == "snapshot" else None
    forked = fresh.run("ask", snapshot=path, environment=reports, zygote="default", **asked)
    assert forked["outputs"] == anew and anew
    assert bool(forked["reports"]) == (how == "snapshot")
    found = start_report.read(tmp_path / "start")
    assert not ANEW & set(found.seconds), found.waterfall()
    assert "engine init" in found.seconds, "an engine of its own process was seen"
    late = {name for process in found.processes for name in process.imported}
    assert not late & {*preimport.LATER, "compressed_tensors"} and len(late) < 10, late


def test_two_ranks(zygote: Zygote, asked: dict[str, Any], tmp_path: Path):
    """Both workers are forks, too."""
    two = asked | {"engine_args": ARGS | {"tensor_parallel_size": 2}}
    path = tmp_path / "weights.thaw"
    fresh.run("freeze", snapshot=path, environment=PARALLEL, zygote="default", **two)
    anew = fresh.run("ask", snapshot=None, environment=PARALLEL, **two)
    reports = {"THAW_START_REPORT": str(tmp_path / "start")}
    forked = fresh.run("ask", snapshot=path, environment=PARALLEL | reports, zygote="default", **two)
    assert forked["outputs"] == anew["outputs"] and len(forked["reports"]) == 2
    found = start_report.read(tmp_path / "start")
    assert not ANEW & set(found.seconds), found.waterfall()
    assert len(found.processes) >= 4, "program, engine, two workers"


def test_a_fresh_process_imports(started_anew: tuple[Any, set[str]]):
    """What the test above looks for is there where there is no zygote."""
    assert {"imports", "engine imports"} <= started_anew[1]


def test_openmp_before_the_engine(program: Callable, anew: Any):
    """GNU's OpenMP would wait in a fork for ever: the engine is started anew."""
    log, outputs, imports = program(within=USES_OPENMP)
    assert outputs == anew
    assert "started anew (spawn) and not forked" in log and "threads run" in log
    assert "engine imports" in imports


def test_a_thread_before_the_engine(program: Callable, anew: Any):
    within = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True, name='x').start()"
    log, outputs, imports = program(within=within)
    assert outputs == anew and "threads run: 'x'" in log and "engine imports" in imports


def test_spawn_is_obeyed(program: Callable, anew: Any):
    log, outputs, imports = program(VLLM_WORKER_MULTIPROC_METHOD="spawn")
    assert outputs == anew and "engine imports" in imports and "not forked" not in log


@pytest.fixture
def engine(zygote: Zygote, asked: dict[str, Any]) -> subprocess.Popen:
    """A client whose program has an engine that waits."""
    code = f"from vllm import LLM; llm = LLM({asked['model']!r}, **{ARGS!r}); print('ready', flush=True); input()"
    process = zygote.popen("-c", code, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=fresh.READ_FROM_THE_LOG)
    while (line := process.stdout.readline()) != "ready\n":
        assert line, "it ended"
    assert len(processes.below(zygote.pid)) >= 3, "keeper, program and engine"
    return process


@pytest.mark.parametrize("who", ["client", "program", "keeper", "engine"])
def test_one_is_killed(zygote: Zygote, engine: subprocess.Popen, who: str):
    """The fixture sees that nothing is left."""
    keeper, running, core, *_ = processes.below(zygote.pid)
    os.kill({"client": engine.pid, "program": running, "keeper": keeper, "engine": core}[who], signal.SIGKILL)
    if who == "engine":  # the program has to notice by itself, at the latest when it ends
        engine.stdin.close()
    code = engine.wait(120)
    assert code == {"client": -9, "program": -9, "keeper": 1}.get(who, code)
    engine.stdout.close()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve(zygote: Zygote, asked: dict, snapshot: Path, port: int, tmp_path: Path, number: signal.Signals):
    """Also what ``thaw serve`` adds without VLLM_PLUGINS: routes behind a token that was made, and a line."""
    state, kv = tmp_path / "state", tmp_path / "kv"
    kv.mkdir()
    command = [*COMMAND, "serve", "--model", asked["model"], "--snapshot", str(snapshot), "--require-zygote"]
    command += ["--enforce-eager", "--max-model-len", "256", "--port", str(port), "--kv-dir", str(kv)]
    preset = fast_start({}, {}, gpu=True)  # vLLM's command line and the zygote take what would be added on a GPU
    command += options(preset.engine_args)
    url = f"http://127.0.0.1:{port}"
    reports = {"THAW_START_REPORT": str(tmp_path / "start")}
    with (tmp_path / "log").open("w") as log:
        environment = changed(fresh.READ_FROM_THE_LOG | reports | preset.environment | {"THAW_STATE_DIR": str(state)})
        environment.pop("THAW_ADMIN_TOKEN", None)
        default = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        finally:
            signal.signal(signal.SIGINT, default)

    def healthy() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
            return False

    try:
        until(healthy, "the server")
        body = {"model": asked["model"], "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
        assert [" ".join(p["arguments"][:2]) for p in zygote.status()["programs"]] == [f"{serve.MODULE} --model"]
        token = state / "admin-token"
        assert token.stat().st_mode & 0o777 == 0o600
        info = [*COMMAND, "kv", "info", "--server", url, "--json"]
        told = subprocess.run(info, capture_output=True, text=True, env=environment, check=False)
        assert told.returncode == 0 and json.loads(told.stdout)["blocks"], told.stderr
        stranger = subprocess.run([*info, "--token", "x" * 24], capture_output=True, text=True, check=False)
        assert stranger.returncode == 2 and "THAW_ADMIN_TOKEN" in stranger.stderr
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
            assert "/v1/thaw/engine/swap" in json.load(answer)["paths"]
        said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("thaw: ready at ")]
        assert len(said) == 1 and url in said[0] and f"the admin token is in {token}" in said[0]
        assert re.search(r" after \d+\.\d s \(.+ \d+\.\d", said[0]), said
        server.send_signal(number)
        code = server.wait(120)
    finally:
        server.kill()
        server.wait()
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    assert not zygote.left_of_programs()
    found = start_report.read(tmp_path / "start")
    assert not ANEW & set(found.seconds), found.waterfall()


@pytest.mark.parametrize("name", versions._KNOWN_START_METHOD)
def test_a_vllm_that_is_not_known_is_left_alone(name: str, zygote: Zygote, monkeypatch: pytest.MonkeyPatch):
    import vllm.utils.system_utils as utils

    other = lambda: None  # noqa: E731
    monkeypatch.setattr(utils, name, other)
    before = dict(vars(utils))
    assert versions.allow_forks(lambda: None) is False
    assert dict(vars(utils)) == before
    monkeypatch.delattr(utils, name)
    assert versions.allow_forks(lambda: None) is False


def test_this_vllm_is_known(zygote: Zygote, monkeypatch: pytest.MonkeyPatch):
    import vllm.utils.system_utils as utils

    real = utils._maybe_force_spawn
    monkeypatch.setattr(utils, "_maybe_force_spawn", real)  # so that it is put back
    monkeypatch.setattr(versions, "_chosen", [])
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's CPU platform does
    said = [None, "a reason", None]
    assert versions.allow_forks(lambda: said.pop(0)) and utils._maybe_force_spawn is not real
    for method in ("fork", "spawn", "fork"):
        utils._maybe_force_spawn()
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # as the user does
    versions.note_choice()
    utils._maybe_force_spawn()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and said == []


THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, name='collector', daemon=True).start()\n"


@pytest.mark.parametrize(("code", "said"), [(THREAD, "'collector'"), (USES_OPENMP, "an OpenMP pool")])
def test_a_module_that_no_fork_survives(code: str, said: str, zygote: Zygote, tmp_path: Path):
    """Of the user's, by ``--import``."""
    (tmp_path / "users_module.py").write_text(code)
    with made(preimport.__name__, name="second") as second, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")
        with pytest.raises(UnsupportedError, match=f"after users_module, which is to blame.*{said}"):
            second.start(("users_module",))
