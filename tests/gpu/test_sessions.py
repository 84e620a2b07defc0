"""Sessions on the GPU, kept in one process and taken up in another: every page, token and log-probability equal."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.models import KINDS as LLAMA
from tests.engines.vllm.models import with_tokenizer
from tests.engines.vllm.session_cuts import KINDS as CUTS
from tests.engines.vllm.session_cuts import apart, cuts, prompts
from tests.engines.vllm.test_kv import ID, LONG, OTHER, engine, same
from tests.engines.vllm.test_sessions import DIVERSE, GREEDY
from tests.gpu.test_kv import ARGS, KINDS

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store


@pytest.mark.parametrize("kind", list(KINDS))
def test_taken_up_in_another_process(kind: str, checkpoints: Callable, tmp_path: Path):
    name, extra = KINDS[kind]
    args = ARGS | extra | {"model": str(checkpoints(name))}
    store = str(tmp_path / "store")
    about: dict[str, Any] = {"store": store, "model_id": ID}
    goes_on = {"do": "resume", "session": "cut", **about}
    forked = {"do": "fork", "session": "trunk", "n": 3, "sampling": DIVERSE, **about}
    steps = [
        {"do": "checkpoint", "tokens": LONG, "sampling": GREEDY, "labels": ["trunk"], **about},
        {"do": "branch", "session": "trunk", "at": 410, "labels": ["cut"], "store": store},
        {"do": "freeze", "path": tmp_path / "before.thawkv", "model_id": ID},
        goes_on,
        forked,
        {"do": "info", "model_id": ID},
    ]
    kept, _, _, living, branches, info = engine(tmp_path, steps, **args)
    assert kept["blocks"] == 423 // 16 and info["free"] == info["blocks"] - 1
    steps = [
        {"do": "resume", "session": "trunk", "only": True, "sampling": GREEDY, **about},
        {"do": "freeze", "path": tmp_path / "after.thawkv", "model_id": ID},
        goes_on,
        forked,
        {"do": "ask", "prompts": [OTHER], "max_tokens": 2},
        {"do": "info", "model_id": ID},
    ]
    back, _, anew, again, _, info = engine(tmp_path, steps, **args)
    assert back["lost"] == back["left_out"] == back["present"] == 0 and back["cached"] == 416
    assert info["free"] == info["blocks"] - 1 and fsck(Store(store)).sound
    before, after = (pages_by_address(tmp_path / f"{name}.thawkv") for name in ("before", "after"))
    assert after and after.items() <= before.items()
    assert same([anew["answer"]], [living["answer"]]) and apart(kept["answer"], anew["answer"], 10) is None
    for ours, theirs in zip(again, branches, strict=True):  # how they meet in a step changes roundings
        assert apart(theirs["answer"], ours["answer"], 0) is None


def test_cut_at_any_token(tmp_path: Path):
    """Exact by every parameter on vLLM's V2 runner; with batch-invariant kernels as if nothing had happened."""
    model = with_tokenizer(LLAMA["untied"](tmp_path / "model"))
    rng = random.Random(11)
    at = {kind: sorted(rng.sample(range(1, 23), 3)) for kind in CUTS}
    args = ARGS | KINDS["graphs"][1] | {"model": str(model)}
    found = cuts(tmp_path, prompts(rng, 70, 500, 40), CUTS, at, 24, invariant=True, **args)
    assert found["wrong"] == [] and found["v2"]
    assert found["cuts"] == found["as_uninterrupted"] == 3 * len(CUTS)
