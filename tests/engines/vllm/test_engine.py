"""Whole engines in fresh processes: tokens and log-probabilities equal after thawing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm import forks

from thaw_vllm.cli.main import main
from thaw_vllm.errors import CorruptionError, MismatchError, StorageError, UsageError
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.open import open_rank, open_snapshot

pytestmark = pytest.mark.vllm

PROMPTS = [list(range(5, 40)), list(range(100, 180)), [7, 7, 7]]
ARGS: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True}


def ask(model: Path | None, snapshot: Path | None, **changes: Any) -> dict[str, Any]:
    return forks.run(
        "ask",
        model=None if model is None else str(model),
        snapshot=snapshot,
        engine_args=ARGS | changes,
        questions=PROMPTS,
        max_tokens=16,
    )


def freeze(model: Path, snapshot: Path, **changes: Any) -> dict[str, Any]:
    return forks.run("freeze", model=str(model), snapshot=snapshot, engine_args=ARGS | changes)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="class")
def manifest(checkpoints: Callable, room: Path) -> Path:
    path = room / "tp2" / "weights.thaw"
    path.parent.mkdir()
    reports = freeze(checkpoints("tied"), path, tensor_parallel_size=2)["reports"]
    assert len(reports) == 2
    return path


class TestTensorParallel:
    """Two ranks: a manifest, a second file, and an engine equal to the default one."""

    def test_the_set(self, manifest: Path):
        with open_snapshot(manifest) as first, open_rank(manifest, 1) as second:
            headers = [o.snapshot.header for o in (first, second)]
        assert [h.identity.parallel.tp_rank for h in headers] == [0, 1]
        assert headers[0].identity.model == headers[1].identity.model is not None
        assert headers[0].ranks.id == headers[1].ranks.id
        names = sorted(p.name for p in manifest.parent.iterdir())
        assert names[-2:] == ["weights.rank1.thaw", "weights.thaw"] and len(names) == 3
        assert (manifest.parent / "weights.rank1.thaw").resolve().name == headers[0].ranks.members[0].name

    def test_tokens_and_logprobs_are_equal(self, manifest: Path, checkpoints: Callable):
        default = ask(checkpoints("tied"), None, tensor_parallel_size=2)
        thawed = ask(checkpoints("tied"), manifest, tensor_parallel_size=2)
        assert len(thawed["reports"]) == 2 and all(r["verified"] == "xxh3" for r in thawed["reports"])
        assert thawed["outputs"] == default["outputs"]

    def test_another_number_of_stages(self, manifest: Path, checkpoints: Callable):
        import thaw_vllm

        with pytest.raises(MismatchError, match="pipeline_parallel_size=1"):
            thaw_vllm.load(str(checkpoints("tied")), manifest, pipeline_parallel_size=2)

    def test_a_rank_that_fails_ends_the_others(self, manifest: Path, checkpoints: Callable, tmp_path: Path):
        """With its own error, once, and no process stays."""
        for path in manifest.parent.iterdir():
            shutil.copy(path, tmp_path / path.name, follow_symlinks=False)
        with open_rank(tmp_path / manifest.name, 1) as opened:
            place = opened.snapshot.preamble.payload_at + opened.snapshot.chunks[-1].stored_at
            damaged = opened.source.name
        with open(damaged, "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(CorruptionError, match=r"^the process .*rank1\.thaw") as raised:
            ask(checkpoints("tied"), tmp_path / manifest.name, tensor_parallel_size=2)
        assert str(raised.value).count("Error") <= 1
        mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
        assert mine == []

    def test_a_missing_rank(self, manifest: Path, tmp_path: Path):
        shutil.copy(manifest, tmp_path / "weights.thaw")
        with (
            pytest.raises(CorruptionError, match="copy every file of the set"),
            open_rank(tmp_path / "weights.thaw", 1),
        ):
            pass


def test_replicated_weights_stored_once(checkpoints: Callable, room: Path):
    """Of latent attention both ranks hold the projection that is cached."""
    model, path, again = checkpoints("latent-attention"), room / "mla" / "w.thaw", room / "mla" / "once.thaw"
    path.parent.mkdir()
    changes: dict[str, Any] = {"tensor_parallel_size": 2, "skip_tokenizer_init": True}
    freeze(model, path, **changes)
    reports = rewrite(path, again, compress=False, once=True)
    with open_rank(again, 1) as opened:
        owners = {tensor.storage: tensor.name for tensor in opened.snapshot.index.tensors}
        names = {owners[kept.storage].rsplit(".", 2)[1] for kept in opened.snapshot.index.kept}
    assert names == {"kv_a_proj_with_mqa"}
    assert [report.kept for report in reports] == [0, 2 * (512 + 64) * 128 * 2]
    thawed, default = ask(model, again, **changes), ask(model, path, **changes)
    assert len(thawed["reports"]) == 2 and all(r["verified"] == "xxh3" for r in thawed["reports"])
    assert thawed["outputs"] == default["outputs"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


class TestWithoutTheCheckpoint:
    """The snapshot carries config and tokenizer; nothing else of the model directory is needed."""

    def test_load_from_the_snapshot_alone(self, checkpoints: Callable, room: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("THAW_CACHE_DIR", str(room / "cache"))
        directory = room / "gone"
        shutil.copytree(checkpoints("moe"), directory)
        path = room / "moe.thaw"
        freeze(directory, path, compress=True)
        expected = ask(directory, None)["outputs"]
        shutil.rmtree(directory)
        assert ask(None, path)["outputs"] == expected
        assert list((room / "cache" / "models").iterdir())


@pytest.fixture(scope="class")
def server(checkpoints: Callable, room: Path) -> Iterator[Callable[[], tuple[str, Path]]]:
    """It has been started; called, it waits until the server is healthy."""
    model, path = checkpoints("int8"), room / "int8.thaw"
    freeze(model, path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not the ``vllm`` script: the CPU wheel's looks for metadata under the name of the CUDA one and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [
        "--load-format",
        "thaw",
        "--model-loader-extra-config",
        json.dumps({"snapshot": str(path)}),
        "--enforce-eager",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    log = room / "server.log"
    with log.open("wb") as stream:
        variables = os.environ | forks.PLAIN
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=variables)

    def healthy() -> tuple[str, Path]:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        return f"http://127.0.0.1:{port}/v1", model

    try:
        yield healthy
    finally:
        process.terminate()
        process.wait(60)


class TestServer:
    """vLLM's own server with ``--load-format thaw``, no import by the user."""

    def test_completions_are_equal(self, server: Callable[[], tuple[str, Path]], checkpoints: Callable):
        from openai import OpenAI

        expected = ask(checkpoints("int8"), None)["outputs"][0]  # meanwhile the server starts
        url, model = server()
        client = OpenAI(base_url=url, api_key="none")
        answer = client.completions.create(
            model=str(model), prompt=PROMPTS[0], max_tokens=16, temperature=0, logprobs=1
        )
        assert answer.choices[0].text == expected["text"]
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(
            [max(lp for _, lp in step) for step in expected["logprobs"]], abs=0
        )


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server is healthy; its log's end when it ends first."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not become healthy")


class TestBeforeTheEngineStarts:
    """Mistakes that ``load`` tells at once."""

    def test_no_snapshot(self):
        import thaw_vllm

        with pytest.raises(UsageError, match="needs a snapshot"):
            thaw_vllm.load("model")

    def test_a_model_directory_that_is_not_there(self, tmp_path: Path):
        import thaw_vllm
        from thaw_vllm.engines.vllm.api import freeze_checkpoint

        with pytest.raises(StorageError, match="there is no model directory"):
            freeze_checkpoint(str(tmp_path / "none"), tmp_path / "w.thaw")
        with pytest.raises(StorageError, match="there is no model directory"):
            thaw_vllm.load(str(tmp_path / "none"), tmp_path / "w.thaw")

    def test_a_module_snapshot(self, tmp_path: Path):
        import torch

        import thaw_vllm

        thaw_vllm.freeze_model(torch.nn.Linear(2, 2), tmp_path / "m.thaw")
        with pytest.raises(MismatchError, match="vLLM needs the raw stage"):
            thaw_vllm.load("some/model", tmp_path / "m.thaw")

    def test_the_error_of_a_worker_reaches_the_caller(self, checkpoints: Callable, room: Path):
        path = room / "untied.thaw"
        freeze(checkpoints("untied"), path)
        with pytest.raises(MismatchError, match=r"^the process .*holds dtype 'bfloat16'"):
            ask(checkpoints("untied"), path, dtype="float32")


class TestSmolLM2:
    """A real model; made by ``make model``."""

    def test_every_tensor_is_equal(self, smollm2: Path, load: Callable, thaw_args: Callable, tmp_path: Path):
        snapshot = tmp_path / "smollm2.thaw"
        default = load(smollm2)
        load(smollm2, **thaw_args(snapshot, mode="freeze"))
        thawed = load(smollm2, **thaw_args(snapshot))
        assert thawed.raw == default.raw
        assert thawed.processed() == default.processed()

    def test_the_demo(self, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
        forks.in_place_of_new(monkeypatch)
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "CRITICAL")  # the demo's table is whole whatever the user's level
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # or the command sets it, for good
        assert main(["demo", "--model", str(smollm2.absolute()), "--max-tokens", "12", "--json"]) == 0
        result = json.loads(capfd.readouterr().out)
        assert result["equal"] and "Paris" in result["answers"][0] and len(result["answers"]) == 3
        assert result["thaw"]["weights"] > 0 and result["default"]["weights"] > 0
