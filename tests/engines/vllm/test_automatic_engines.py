"""Snapshots that starts keep, with whole engines: several ranks that decide alike, and ``thaw serve``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm import forks
from tests.engines.vllm.test_engine import ARGS, PROMPTS
from tests.zygote.running import COMMAND

from thaw_vllm.weights import cache
from thaw_vllm.weights.open import open_rank

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def kept(place: Path) -> list[cache.Entry]:
    return [entry for entry in cache.entries(place) if entry.made is not None]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_two_ranks(checkpoints: Callable, tmp_path: Path):
    """Whatever befalls the file of one, both do the same."""
    place = tmp_path / "snapshots"

    def ask() -> tuple[Any, list[str], str]:
        log = tmp_path / "log"
        answer = forks.run(
            "ask",
            model=str(checkpoints("tied")),
            snapshot="auto",
            engine_args=ARGS | {"tensor_parallel_size": 2},
            questions=PROMPTS,
            max_tokens=4,
            more={"THAW_CACHE_DIR": str(tmp_path)},
            log=log,
        )
        kinds = ["froze" if "file_size" in report else "thawed" for report in answer["reports"]]
        return answer["outputs"], kinds, log.read_text(errors="replace")

    frozen, kinds, _ = ask()
    assert kinds == ["froze", "froze"]
    (entry,) = kept(place)
    assert len(entry.names) == 3
    shutil.copytree(place, tmp_path / "whole", symlinks=True)
    assert ask()[:2] == (frozen, ["thawed", "thawed"])
    with open_rank(entry.path, 1) as opened:
        member = Path(opened.source.name)
        flip(member, opened.snapshot.preamble.payload_at + opened.snapshot.chunks[0].stored_at)
    outputs, kinds, log = ask()
    assert (outputs, kinds) == (frozen, []) and "could not be used" in log and kept(place) == []
    shutil.rmtree(place)
    shutil.move(tmp_path / "whole", place)
    member.unlink()
    outputs, kinds, log = ask()
    assert (outputs, kinds) == (frozen, ["froze", "froze"]) and "cannot be used" in log
    assert [len(entry.names) for entry in kept(place)] == [3] and not member.exists()


def serve(model: Path, log: Path, *options: str, **environment: str) -> tuple[str, list[str]]:
    """A completion of ``thaw serve``, and what the lines of its log say that are about snapshots."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, "serve", "--model", str(model), "--port", str(port), "--enforce-eager", *options]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--max-model-len", "256"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 300
        while "thaw: ready at" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        body = {"model": str(model), "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "logprobs": 1}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            choice = json.load(answer)["choices"][0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").splitlines()
    return json.dumps([choice["text"], choice["logprobs"]]), [line for line in lines if "snapshot" in line]


def test_serve(checkpoints: Callable, tmp_path: Path):
    model, given = checkpoints("untied"), {"THAW_CACHE_DIR": str(tmp_path / "cache")}
    options, given = ("--zygote", forks.NAME), forks.environment(given)
    answers, said = zip(*(serve(model, tmp_path / str(n), *options, **given) for n in range(2)), strict=True)
    (entry,) = kept(tmp_path / "cache" / "snapshots")
    assert any(f"weights frozen to {entry.path}" in line for line in said[0])
    assert any(f"weights thawed from {entry.path}" in line for line in said[1])
    assert answers[0] == answers[1] and not cache.in_use(entry)
