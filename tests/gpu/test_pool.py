"""Several models that share a GPU behind one address: swapped, parked, woken, and what can befall them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("aiohttp", reason="aiohttp is not installed")

from tests.engines.vllm.models import KINDS, with_tokenizer
from tests.engines.vllm.pool_models import toml
from tests.engines.vllm.pool_program import Program, until_healthy
from tests.engines.vllm.test_swap import fine_tuned
from tests.zygote.running import COMMAND, until

from thaw_vllm.zygote import client, processes
from thaw_vllm.zygote.place import Place

ARGS = ["--max-model-len", "256", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(64 << 20)]
ARGS += ["--cudagraph-capture-sizes", "1", "2", "4"]
ALONE = ["--require-zygote", *ARGS]
FORKED = [*COMMAND, "run", "--zygote", "default", "-m", "thaw_vllm"]
PROMPT = [5 + number % 50 for number in range(40)]
ASKED = ("completions", {"prompt": PROMPT, "temperature": 0, "logprobs": 1, "ignore_eos": True})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    """Two that take one another's weights, and one that does not."""
    found = fine_tuned(with_tokenizer(KINDS["untied"](folder / "untied")), folder)
    return found | {"other": with_tokenizer(KINDS["sliding-window"](folder / "other"))}


@pytest.fixture(scope="module")
def alone(zygote: Place, models: dict[str, Path], folder: Path) -> dict[str, tuple[int, Any]]:
    """What each gives in a server of its own, loaded by vLLM."""
    found, programs = {}, {}
    try:
        for name, path in models.items():
            options = ["--model", str(path), "--served-model-name", name, "--snapshot", "none"]
            own = {"THAW_STATE_DIR": str(folder / f"state-{name}")}
            programs[name] = Program(folder, f"alone-{name}", *options, *ALONE, healthy=False, **own)
        for name, program in programs.items():
            until_healthy(program)
            found[name] = program.answer(name, *ASKED)
    finally:
        for program in programs.values():
            program.stop()
    assert {status for status, _ in found.values()} == {200}, found
    assert len({json.dumps(answer["choices"]) for _, answer in found.values()}) == 3, "they answer alike"
    return found


@pytest.fixture(scope="module")
def pool(models: dict[str, Path], alone: dict[str, Any], folder: Path) -> Iterator[Program]:
    snapshots = {name: folder / f"{name}.thaw" for name in models}
    freezing = [
        subprocess.Popen([*FORKED, "freeze", "--model", models[name], "--output", path])
        for name, path in snapshots.items()
    ]
    assert [process.wait() for process in freezing] == [0, 0, 0]
    (folder / "models.toml").write_text(toml(models, snapshots, ARGS, drain=30, deadline=200))
    program = Program(folder, "pool", "--models", str(folder / "models.toml"), "--require-zygote")
    yield program
    assert program.stop() == 0, program.log.read_text()[-3000:]


def told(pool: Program) -> list[str]:
    """Changes so far."""
    return re.findall(r"thaw\.serve: (started|swapped|parked|woken|lost|failed) ", pool.log.read_text())


def engine(pool: Program, state: str) -> int | None:
    """The pool's own process of an engine in this state."""
    found = [one["pid"] for one in pool.admin("status")[1]["engines"] if one["state"] == state]
    return found[0] if found else None


def core_of(pid: int, folder: Path) -> int:
    """The process that has the GPU: a zygote's child, so that only the reports of its start tell whose it is."""
    server, core = sorted(int(path.stem) for path in folder.glob(f"state/starts/*-{pid}/*.jsonl"))
    assert core in processes.children(server)
    return core


def test_every_way_to_a_model_gives_its_answer(pool: Program, alone: dict[str, Any]):
    for name in ("first", "second", "other", "first", "second", "other", "second"):
        assert pool.answer(name, *ASKED) == alone[name], name
    assert told(pool)[:6] == ["started", "swapped", "parked", "started", "parked", "woken"]
    assert told(pool).count("started") == 2 and not {"lost", "failed"} & set(told(pool))
    engines = pool.admin("status")[1]["engines"]
    assert sorted(one["state"] for one in engines) == ["parked", "ready"]
    assert all(one["host_bytes"] > 0 for one in engines if one["state"] == "parked")


def test_no_memory_is_left_on_the_gpu(pool: Program, alone: dict[str, Any], memory: Callable):
    """Somebody else has taken it: neither a start nor waking succeeds, each says so, and later they do."""
    pool.answer("first", *ASKED)
    pool.admin("models/first/park", {})
    with memory():
        status, answer = pool.answer("first", *ASKED)
        assert status == 503 and "memory" in answer["error"]["message"], answer
    time.sleep(pool.retry_after + 0.2)
    assert pool.answer("first", *ASKED) == alone["first"]


@pytest.mark.parametrize(
    ("state", "before", "then"),
    [("swapping", "first", "second"), ("parking", "first", "other"), ("waking", "other", "first")],
)
def test_killed_in_the_middle_of_a_switch(
    state: str, before: str, then: str, pool: Program, alone: dict[str, Any], folder: Path
):
    for name in dict.fromkeys((then, before)):
        assert pool.answer(name, *ASKED) == alone[name]
    lost = told(pool).count("lost")
    cores = {one["pid"]: core_of(one["pid"], folder) for one in pool.admin("status")[1]["engines"]}

    async def work() -> tuple[int, Any]:
        asking = asyncio.create_task(asyncio.to_thread(pool.answer, then, *ASKED))
        while (pid := engine(pool, state)) is None:
            await asyncio.sleep(0.001)
        os.kill(cores[pid], signal.SIGKILL)
        return await asking

    assert asyncio.run(work()) == alone[then], "another engine took its place"
    assert told(pool).count("lost") == lost + 1
    assert pool.answer(before, *ASKED) == alone[before]


@pytest.fixture
def memory() -> Callable:
    """Takes all of the GPU's memory, but for 200 MiB."""

    @contextlib.contextmanager
    def taken() -> Iterator[None]:
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(free - (200 << 20), dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del held
            torch.cuda.empty_cache()

    return taken


def test_nothing_is_left(pool: Program, zygote: Place):
    """Runs last: the pool ends, and its engines with it."""
    clients, forked = processes.below(pool.process.pid), processes.below(client.ask(zygote, "status")["pid"])
    below = [*clients, *forked]
    assert clients and len(forked) >= 2 * len(clients) and pool.stop() == 0
    until(lambda: not any(Path(f"/proc/{one}").exists() for one in below), "all processes to end")
