"""Weights swapped in place and engines parked, on the GPU: nothing is left out here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_kv import run_script
from tests.engines.vllm.test_swap import (
    environment,
    judge,
    judge_asynchronous,
    judge_killed,
    ranks,
    run,
    snapshots,
    weights_of,
)

from thaw_vllm.transport.process_checkpoint import unsupported

ARGS: dict[str, Any] = {
    "max_model_len": 512,
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_sleep_mode": True,
}
NOBODY = 65534
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"cudagraph_capture_sizes": [1, 2, 4]},
}


@pytest.fixture
def prepared(
    checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return snapshots(checkpoints("untied"), tmp_path_factory.mktemp("swap"), load, thaw_args)


@pytest.mark.parametrize("mode", MODES)
def test_swaps_and_parks(mode: str, prepared: dict[str, Any], tmp_path: Path):
    asked = prepared | {"engine_args": ARGS | MODES[mode], "cycles": 6, "park": 4, "asynchronous": False}
    found = run(tmp_path, asked)
    judge(found, asked)
    first = (found["first"]["answers"], found["digests"])
    may = unsupported() is None and os.geteuid() == 0
    for number, told in enumerate(found["parks"]):
        assert (told["answers"], told["digests"]) == first, (number, "every tensor, where it was")
        assert told["lost"]["error"] == "StorageError", "its snapshot was gone, and it stayed parked"
        assert told["cut"]["error"] == "CorruptionError" and "truncated" in told["cut"]["message"]
        last = number == len(found["parks"]) - 1
        assert told["parked"]["driver"] is (may and not last), told["parked"]["why"]
        assert told["woken"]["bytes"] == found["check"]["bytes"]
        blocks = told["woken"]["blocks"]
        assert (blocks > 0 and told["cached"] > 0) if number % 2 else (blocks == 0 and told["cached"] == 0)
    kept = found["kept"]
    assert (kept["answers"], weights_of(kept["digests"])) == (first[0], weights_of(first[1]))
    assert kept["woken"]["bytes"] == 0 and kept["parked"]["path"] is None


def test_requests_never_see_two_weights(prepared: dict[str, Any], tmp_path: Path):
    more = {"cycles": 0, "park": 1, "asynchronous": True, "long": 400, "begun": 0.05, "settle": 5}
    found = run(tmp_path, prepared | {"engine_args": ARGS | MODES["graphs"]} | more)
    judge_asynchronous(found, more)
    assert found["parked_running"][1] == "abort" and found["parked"]["aborted"] == 1
    assert found["after_wake"] == found["after_cancel"] == found["second"]


def test_an_engine_without_sleep_mode_and_one_that_vllm_loaded(prepared: dict[str, Any], tmp_path: Path):
    """Neither can be parked, both go on."""
    script = tmp_path / "refusals.py"
    script.write_text(REFUSALS)
    args = json.dumps({name: value for name, value in ARGS.items() if name != "enable_sleep_mode"})
    command = [sys.executable, str(script), prepared["model"], prepared["first"], prepared["second"], args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line.split("|") for line in done.stdout.splitlines() if "Error|" in line]
    assert told == [["UsageError", "UnsupportedError", "UnsupportedError"]], done.stdout[-2000:]


def test_two_ranks(checkpoints: Callable, tmp_path: Path):
    """Each takes its own file, and both give their weights' and cache's memory back; the driver is not asked."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    memory = {name: ARGS[name] for name in ("gpu_memory_utilization", "kv_cache_memory_bytes")}
    asked = ranks(checkpoints, tmp_path, **memory) | {"cycles": 2, "park": 2, "asynchronous": False}
    asked["engine_args"] = ARGS | MODES["graphs"] | {"tensor_parallel_size": 2}
    found = run(tmp_path, asked)
    judge(found, asked)
    assert any(path.startswith("rank 1: ") for path in found["digests"])
    assert "several ranks" in found["parks"][0]["parked"]["why"]
    for told in found["parks"]:
        assert (told["answers"], told["digests"]) == (found["first"]["answers"], found["digests"])
        assert not told["parked"]["driver"]
        assert told["woken"]["bytes"] == found["check"]["bytes"]


@pytest.mark.parametrize("what", ["swap", "park", "parked", "restore", "fill"])
def test_an_engine_that_is_killed(what: str, prepared: dict[str, Any], tmp_path: Path):
    """In the middle of being filled, parked, and woken (driver, weights), and while it is parked."""
    if what != "swap" and (unsupported() is not None or os.geteuid() != 0):
        pytest.skip("the driver cannot or may not take a process's state")
    asked = prepared | {"engine_args": ARGS | MODES["eager"], "what": what, "folder": tmp_path}
    found = run_script("swap_faults.py", tmp_path, asked, environment())
    judge_killed(found)
    assert "died" in found["told"]["message"]


def test_parking_without_privileges(prepared: dict[str, Any]):
    """As nobody: by the driver if it lets him, else by sleep mode, which says why and how much stays."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        model = shutil.copytree(prepared["model"], folder / "model")
        first = shutil.copy(prepared["first"], folder / "first.thaw")
        homes = {name: made for name in ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME")}
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        asked = {"model": model, "first": first, "engine_args": ARGS | MODES["eager"], "what": "nothing"}
        nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        found = run_script("swap_faults.py", folder, asked | {"folder": folder}, environment() | homes, **nobody)
    assert found["parked"]["driver"] or "root" in found["parked"]["why"], found["parked"]
    assert found["parked"]["driver"] or found["parked"]["left"] > 0
    assert (found["after"], found["digests after"]) == (found["before"], found["digests"])


REFUSALS = """
import json, os, sys

os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def refused(work):
    try:
        work()
    except thaw_vllm.errors.ThawError as error:
        return type(error).__name__
    return "nothing"


if __name__ == "__main__":
    import thaw_vllm
    from vllm import LLM

    model, first, second, args = *sys.argv[1:4], json.loads(sys.argv[4]) | {"enforce_eager": True}
    llm = thaw_vllm.load(model, first, **args)
    told = [refused(lambda: thaw_vllm.park(llm))]
    llm.llm_engine.engine_core.shutdown()
    llm = LLM(model=model, enable_sleep_mode=True, **args)
    told += [refused(lambda: thaw_vllm.swap_weights(llm, second)), refused(lambda: thaw_vllm.park(llm))]
    print("|".join(told))
"""
