"""KV blocks on the GPU, frozen in one process and thawed in another: every page, token and log-probability equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.test_kv import FORKED, ID, LONG, cached, engine, run_script, same

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.engines.vllm.kv.regions import gather, page_of, rows, scatter, scratch

ARGS: dict[str, Any] = {"block_size": 16, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "graphs": ("untied", {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2]}}),
    "windows": ("sliding-window", {}),
    "fp8": ("untied", {"kv_cache_dtype": "fp8"}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_thawed_in_another_process(kind: str, checkpoints: Callable, tmp_path: Path):
    name, extra = KINDS[kind]
    args = ARGS | extra | {"model": str(checkpoints(name))}
    prompts, one, two = [LONG, FORKED], tmp_path / "one.thawkv", tmp_path / "two.thawkv"
    ask, known = {"do": "ask", "prompts": prompts}, {"model_id": ID}
    cold, hit, frozen = engine(tmp_path, [ask, ask, {"do": "freeze", "path": one} | known], **args)
    assert cached(cold)[0] == 0 and min(cached(hit)) > 300, cached(hit)
    steps = [{"do": "restore", "path": one} | known, ask, {"do": "freeze", "path": two} | known, {"do": "info"} | known]
    restored, thawed, _, info = engine(tmp_path, steps, **args)
    assert restored["blocks"] == frozen["blocks"] or kind == "windows"
    assert cached(thawed) == cached(hit)
    assert same(thawed, hit)
    assert [answer["tokens"] for answer in thawed] == [answer["tokens"] for answer in cold]
    assert info["free"] == info["blocks"] - 1
    mine, theirs = pages_by_address(two), pages_by_address(one)
    assert theirs and all(mine[page] == digest for page, digest in theirs.items())


def test_freezing_while_requests_stream(checkpoints: Callable, tmp_path: Path):
    """On a stream of its own, in a thread of its own: no token changes, and the pages are those of a freeze alone."""
    prompts = [[3 + (number * (7 + k)) % 490 for number in range(64 + 8 * k)] for k in range(32)]
    args = ARGS | {"model": str(checkpoints("fp32")), "dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    path, again = tmp_path / "x.thawkv", tmp_path / "again.thawkv"
    asked = {"engine": args, "prompts": prompts, "max_tokens": 96, "path": path, "model_id": ID}
    answer = run_script("kv_load.py", tmp_path, asked)
    assert answer["beside"] == answer["alone"]
    assert answer["reports"]
    print(json.dumps(answer["gaps"]))
    known = {"model_id": ID}
    steps = [{"do": "restore", "path": path} | known, {"do": "freeze", "path": again} | known]
    steps.append(
        {
            "do": "ask",
            "prompts": [prompt + tokens for prompt, tokens in zip(prompts[:4], answer["alone"][:4], strict=True)],
        }
    )
    restored, _, answers = engine(tmp_path, steps, **args)
    assert restored["blocks"] == answer["reports"][-1]["blocks"]
    assert pages_by_address(again) == pages_by_address(path)
    assert min(cached(answers)) > 96


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_pages_go_where_they_belong(dtype: torch.dtype, where: str):
    """From the GPU's own memory and from the host's, in any order, and nothing else is touched."""
    page, count = 24 * 1024, 40
    memory = torch.randint(0, 256, (count, 2 * page), dtype=torch.uint8, device="cuda")
    view = memory.view(dtype)[:, : page // dtype.itemsize]
    assert page_of(view) == page
    before = memory.clone()
    ids, slots = [3, 39, 0, 17, 4], [2, 0, 4, 3, 1]
    with scratch(5 * page, torch.device("cuda")) as given:
        pages = given.view(5, page)
        gather(view, rows(ids, view.device), pages)
        assert torch.equal(pages, before[ids, :page])
        view.zero_()
        source = pages.to(where)
        scatter(view, source, rows(slots, source.device), rows(ids, view.device))
    expected = before.clone()
    expected[:, :page] = 0
    expected[ids, :page] = before[[ids[slot] for slot in slots], :page]
    assert torch.equal(memory, expected)


def test_memory_on_the_way_is_returned():
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    with scratch(512 << 20, torch.device("cuda")) as given:
        assert given.nbytes == 512 << 20 and given.is_cuda
        given.fill_(7)
        assert torch.cuda.mem_get_info()[0] <= before[0] - (512 << 20)
    assert torch.cuda.mem_get_info()[0] >= before[0] - (4 << 20)
    assert torch.cuda.memory_reserved() - before[1] < 4 << 20
