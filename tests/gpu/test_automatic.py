"""Snapshots that starts keep, on the GPU: of an engine that was frozen as it started, and of the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_automatic_engines import flip, kept
from tests.engines.vllm.test_swap import judge, run, snapshots, weights_of
from tests.gpu.test_swap import ARGS, MODES

from thaw_vllm.engines.vllm import fresh
from thaw_vllm.weights.open import open_rank

PROMPTS = [list(range(5, 40)), list(range(100, 180))]


def test_either_is_swapped_parked_and_woken(
    checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "swap").mkdir()
    asked = snapshots(checkpoints("untied"), tmp_path / "swap", load, thaw_args)
    asked |= {"start": "auto", "engine_args": ARGS | MODES["graphs"], "cycles": 2, "park": 2, "asynchronous": False}
    found = []
    for how, said in (("frozen", "froze "), ("thawed", "thawing from the cache")):
        (tmp_path / how).mkdir()
        told = run(tmp_path / how, asked)
        judge(told, asked)
        assert said in (tmp_path / how / "log.txt").read_text(errors="replace")
        found.append((told["first"]["answers"], weights_of(told["digests"])))
    (ours, tensors), (theirs, others) = found
    assert ours == theirs
    for one, other in ((tensors, others), (others, tensors)):  # by which path they are reached depends on compiling
        same = {digest for path, digest in one.items() if "compile" not in path}
        assert same and same <= {*other.values()}


def test_a_byte_that_has_changed(checkpoints: Callable, tmp_path: Path):
    """Found on the device, in the middle of the fill: vLLM loads, and the answers are right."""

    def ask() -> tuple[Any, str]:
        log = tmp_path / "log"
        args = {"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
        answer = fresh.run(
            "ask",
            model=str(checkpoints("untied")),
            snapshot="auto",
            engine_args=args | {"gpu_memory_utilization": 0.1},
            questions=PROMPTS,
            environment={"THAW_CACHE_DIR": str(tmp_path)},
            log=log,
        )
        return answer["outputs"], log.read_text(errors="replace")

    frozen, _ = ask()
    (entry,) = kept(tmp_path / "snapshots")
    with open_rank(entry.path, 0) as opened:
        chunk = opened.snapshot.chunks[len(opened.snapshot.chunks) // 2]
        flip(Path(opened.source.name), opened.snapshot.preamble.payload_at + chunk.stored_at)
    outputs, log = ask()
    assert outputs == frozen and "could not be used" in log and kept(tmp_path / "snapshots") == []
