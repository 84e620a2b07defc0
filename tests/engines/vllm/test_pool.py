"""``thaw serve`` with several models, real vLLM's servers in forks of a zygote behind it, asked through real clients.

Whatever a model is asked through the pool, its answer is the one that its own server gives.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm import forks, pool_program
from tests.engines.vllm.pool_models import prepare, toml
from tests.engines.vllm.test_swap import environment
from tests.serve.chromium import Heard, browser
from tests.serve.disks import fill, small_disk
from tests.zygote.running import Zygote, alive, made, until

from thaw_vllm.engines.vllm import preimport
from thaw_vllm.zygote import processes

openai = pytest.importorskip("openai", reason="openai is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARGS = ["--enforce-eager", "--max-model-len", "512", "--block-size", "32"]
ARGS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
TEXT = "The capital of France is"
CHAT = [{"role": "user", "content": "Name a colour."}]
ANSWER = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": ANSWER}}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("completions", {"prompt": TEXT, "temperature": 0}),
    "logprobs": ("completions", {"prompt": TEXT, "temperature": 0, "logprobs": 3}),
    "seed": ("completions", {"prompt": TEXT, "temperature": 0.9, "seed": 7}),
    "n": ("completions", {"prompt": TEXT, "temperature": 0.9, "seed": 7, "n": 3}),
    "stop": ("completions", {"prompt": TEXT, "temperature": 0, "stop": ["."]}),
    "tokens": ("completions", {"prompt": [1, 2, 300, 40, 5], "temperature": 0, "echo": True}),
    "chat": ("chat/completions", {"messages": CHAT, "temperature": 0, "logprobs": True}),
    "schema": (
        "chat/completions",
        {
            "messages": CHAT,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": ANSWER}},
        },
    ),
    "tool": (
        "chat/completions",
        {
            "messages": CHAT,
            "temperature": 0,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "paint"}},
        },
    ),
    "error": ("completions", {"prompt": TEXT, "temperature": -1}),
}
"""What is asked of each model; without its template a model has no chat."""


class Program(pool_program.Program):
    def __init__(self, folder: Path, name: str, *options: str, healthy: bool = True, **environment: str) -> None:
        super().__init__(folder, name, *options, healthy=healthy, **forks.PLAIN | environment)

    def said(self, model: str, what: str) -> tuple[int, Any]:
        """The answer to one of ASKED."""
        return self.answer(model, *ASKED[what])


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with made(preimport.__name__) as one:
        one.start(**forks.PLAIN)
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def models(smollm2: Path, folder: Path) -> dict[str, Path]:
    return prepare(smollm2.absolute(), folder)


def asked_of(name: str) -> list[str]:
    """What is asked of a model: the last has another architecture, and no template."""
    return [what for what, (path, _) in ASKED.items() if name != "windows" or path == "completions"]


@pytest.fixture(scope="module")
def alone(zygote: Zygote, models: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """What each model's own server answers; two are asked at the same time, each of which takes a core."""

    def begun(name: str) -> Program:
        options = ["--model", str(models[name]), "--served-model-name", name, "--require-zygote", *ARGS]
        return Program(folder, f"alone-{name}", *options, healthy=False)

    def ask(name: str, program: Program) -> dict[str, Any]:
        pool_program.until_healthy(program)
        return {what: program.said(name, what) for what in asked_of(name)}

    found: dict[str, dict[str, Any]] = {}
    names = [*models]
    for two in (names[:2], names[2:]):
        programs = [*map(begun, two)]
        try:
            with ThreadPoolExecutor(2) as both:
                found |= zip(two, both.map(ask, two, programs), strict=True)
        finally:
            for program in programs:
                program.stop()
    for answers in found.values():
        wanted = {what: 400 if what == "error" else 200 for what in answers}
        assert {what: status for what, (status, _) in answers.items()} == wanted, answers
    distinct = {json.dumps(answers["logprobs"]) for answers in found.values()}
    assert len(distinct) == len(models), "every model answers otherwise"
    assert json.dumps(found["tuned"]["chat"]) != json.dumps(found["other-template"]["chat"])
    return found


@pytest.fixture(scope="module")
def snapshots(models: dict[str, Path], folder: Path) -> dict[str, Path]:
    return {"tuned": frozen(models["tuned"], folder / "tuned.thaw")}


def frozen(model: Path, path: Path, variables: dict[str, str] | None = None) -> Path:
    command = [*forks.command(), "-m", "thaw_vllm", "freeze", "--model", model, "--output", path]
    done = subprocess.run(command, capture_output=True, text=True, env=variables or forks.environment())
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def pool(
    zygote: Zygote, models: dict[str, Path], snapshots: dict[str, Path], alone: dict, folder: Path
) -> Iterator[Program]:
    (folder / "models.toml").write_text(toml(models, snapshots, ARGS, drain=30, deadline=200))
    program = Program(folder, "pool", "--models", str(folder / "models.toml"), "--require-zygote")
    yield program
    assert program.stop() == 0, program.log.read_text()[-3000:]
    zygote.all_gone()
    assert not processes.below(program.process.pid)


def test_every_answer_is_what_its_model_says_alone(pool: Program, alone: dict[str, dict[str, Any]]):
    for name, answers in alone.items():
        for what, answer in answers.items():
            assert pool.said(name, what) == answer, (name, what)
    _, found = pool.ask("/v1/models")
    assert [one["id"] for one in found["data"]] == list(alone)


def test_clients(pool: Program, alone: dict[str, dict[str, Any]]):
    """openai's, both kinds, streaming token by token, cancelled in the middle; and curl."""
    expected = alone["base"]["greedy"][1]["choices"][0]["text"]
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "base", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
        assert client.completions.create(**asked).choices[0].text == expected
        parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert "".join(parts) == expected and len(parts) == 12

    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as client:
            long = {"model": "base", "prompt": TEXT, "max_tokens": 450, "temperature": 0}
            stream = await client.completions.create(**long, extra_body={"ignore_eos": True}, stream=True)
            async for _ in stream:
                break
            await stream.close()

    generated = metric(pool, "generation_tokens_total")
    asyncio.run(cancelled())
    until(lambda: metric(pool, "num_requests_running") == 0, "the cancelled one's end")
    assert metric(pool, "generation_tokens_total") - generated < 200, "it ended when its client left"

    async def many() -> None:
        async with openai.AsyncOpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                prompt = f"{TEXT}{' ' * (number % 2)}"
                stream = await client.completions.create(**asked | {"prompt": prompt}, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            found = await asyncio.gather(*map(one, range(64)))
            assert set(found[::2]) == {expected} and len(set(found[1::2])) == 1

    asyncio.run(many())
    body = json.dumps({"model": "base", "prompt": TEXT, "max_tokens": 12, "temperature": 0})
    command = [
        "curl",
        "-sS",
        "--fail",
        f"{pool.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == expected


def test_the_page(pool: Program):
    """A model becomes ready before one's eyes, with its waterfall, its tokens and its prefix cache."""
    heard = Heard()
    if pool.admin("status")[1]["models"]["tuned"]["states"]:
        pool.admin("models/tuned/unload", {})
    with browser() as chromium:
        page = heard.listen(chromium.new_page())
        page.set_default_timeout(120_000)
        page.goto(f"{pool.url}/thaw")
        page.get_by_label("Admin token").fill(pool.token_file.read_text().strip())
        page.keyboard.press("Enter")
        row = page.locator("#models tbody tr").filter(has=page.get_by_text("tuned", exact=True))
        row.locator(".badge").filter(has_text="not there").wait_for()
        asking = threading.Thread(target=pool.said, args=("tuned", "greedy"))
        asking.start()
        row.locator(".badge").filter(has_text="starting").wait_for()
        row.locator(".badge").filter(has_text="ready").wait_for()
        asking.join()
        start = page.locator("#starts details").filter(has_text="tuned").first
        start.filter(has_text="to the first token").wait_for()
        if start.get_attribute("open") is None:
            start.locator("summary").click()
        start.locator(".phase").filter(has_text="weights").wait_for()
        page.locator("#caches .cache").filter(has_text="tuned").wait_for()
        page.get_by_role("button", name="Verify tuned.thaw").click()
        page.locator("#snapshots .result").filter(has_text="sound, ").wait_for()
        for _ in range(20):
            pool.said("tuned", "greedy")
            if page.locator("#throughput polyline").count():
                break
        assert page.locator("#throughput polyline").count()
    assert heard.errors == [] and heard.hosts == {"127.0.0.1"}


def metric(pool: Program, name: str) -> float:
    """Of vLLM's, of the model ``base``."""
    with urllib.request.urlopen(f"{pool.url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return float(re.search(rf'^vllm:{name}\{{.*thaw_model="base"\}} (\S+)$', text, re.M)[1])  # type: ignore[index]


@pytest.mark.soak
def test_a_mixed_load(pool: Program, alone: dict[str, dict[str, Any]], soak: Callable):
    """Clients that ask for any model at random make the pool switch, and no answer is another's; nothing grows."""
    names, before = list(alone), _sizes(pool)
    for case in soak(small=2, full=50):
        asked = [(name, what) for name in case.random.sample(names, 2) for what in ("greedy", "stop", "logprobs")]
        case.random.shuffle(asked)

        async def work(asked=asked) -> list[Any]:
            return await asyncio.gather(*(asyncio.to_thread(pool.said, *one) for one in asked))

        for (name, what), found in zip(asked, asyncio.run(work()), strict=True):
            assert _near(found, alone[name][what]), (name, what, found)
    status, told = pool.admin("status")
    assert status == 200 and told["waiting"] == 0 and all(one["requests"] == 0 for one in told["engines"])
    after = _sizes(pool)
    assert after["processes"] <= before["processes"] and after["descriptors"] <= before["descriptors"] + 8
    assert after["rss_mib"] < before["rss_mib"] + 64


def _near(found: tuple[int, Any], expected: tuple[int, Any]) -> bool:
    """Equal but for the last digits of log-probabilities, which depend on what is computed beside."""
    return found[0] == expected[0] and [c["text"] for c in found[1]["choices"]] == [
        c["text"] for c in expected[1]["choices"]
    ]


def _sizes(pool: Program) -> dict[str, float]:
    """Of the router; and how many processes are below it once one engine is there."""
    pool.said("base", "greedy")
    pid = pool.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    return {
        "rss_mib": rss / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": len(processes.below(pid)),
    }


class TestFaults:
    @pytest.mark.parametrize("who", ["client", "server", "engine", "worker"])
    def test_what_is_killed_is_replaced(
        self, who: str, pool: Program, alone: dict[str, dict[str, Any]], zygote: Zygote
    ):
        assert pool.said("base", "greedy") == alone["base"]["greedy"]
        (engine,) = pool.admin("status")[1]["engines"]
        _, server, core, *_ = processes.below(zygote.pid)
        below = {one: Path(f"/proc/{one}/cmdline").read_bytes() for one in processes.below(core)}
        (worker,) = [one for one, words in below.items() if b"resource_tracker" not in words]
        os.kill({"client": engine["pid"], "server": server, "engine": core, "worker": worker}[who], signal.SIGKILL)
        until(
            lambda: engine["pid"] not in [one["pid"] for one in pool.admin("status")[1]["engines"]], "it to be missed"
        )
        assert pool.said("base", "greedy") == alone["base"]["greedy"]

    def test_killed_in_the_middle_of_a_switch(self, pool: Program, alone: dict[str, dict[str, Any]]):
        pool.said("base", "greedy")

        async def work() -> Any:
            asking = asyncio.create_task(asyncio.to_thread(pool.said, "tuned", "greedy"))
            while not (
                found := [e for e in pool.admin("status")[1]["engines"] if e["state"] == "starting" and e["pid"]]
            ):
                await asyncio.sleep(0.02)
            os.kill(found[0]["pid"], signal.SIGKILL)
            return await asking

        status, answer = asyncio.run(work())
        assert status == 503 and "did not start" in answer["error"]["message"]
        time.sleep(1.2)  # until it is tried again
        assert pool.said("tuned", "greedy") == alone["tuned"]["greedy"]

    @pytest.mark.parametrize("how", ["truncated", "replaced", "gone"])
    def test_a_snapshot_that_is_damaged(
        self,
        how: str,
        pool: Program,
        models: dict[str, Path],
        snapshots: dict[str, Path],
        alone: dict,
        tmp_path: Path,
    ):
        pool.said("base", "greedy")
        path = snapshots["tuned"]
        whole = path.read_bytes()
        path.unlink()
        if how == "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        elif how == "replaced":
            frozen(models["other-template"], path)
        try:
            status, answer = pool.said("tuned", "greedy")
            assert status == 503 and "tuned.thaw" in answer["error"]["message"]
            pause = pool.retry_after
        finally:
            path.write_bytes(whole)
        assert pool.said("base", "greedy") == alone["base"]["greedy"]
        time.sleep(pause)
        assert pool.said("tuned", "greedy") == alone["tuned"]["greedy"]

    def test_a_disk_that_is_full(
        self, zygote: Zygote, models: dict[str, Path], alone: dict, folder: Path, tmp_path: Path
    ):
        """Where logs and reports of starts go; answers are what they are."""
        with small_disk(tmp_path / "full") as full:
            name = f"base={models['base']}"
            program = Program(folder, "full", "--register", name, *ARGS, THAW_STATE_DIR=str(full))
            try:
                fill(full)
                assert program.said("base", "greedy") == alone["base"]["greedy"]
                (engine,) = program.admin("status")[1]["engines"]
                os.kill(engine["pid"], signal.SIGKILL)
                until(lambda: program.admin("status")[1]["engines"] == [], "it to be missed")
                assert program.said("base", "greedy") == alone["base"]["greedy"]
            finally:
                assert program.stop() == 0

    def test_parking_on_a_cpu_is_refused(self, pool: Program):
        pool.said("base", "greedy")
        status, answer = pool.admin("models/base/park", {})
        assert status == 409 and "cannot be parked" in answer["error"]["message"]
        assert pool.said("base", "greedy")[0] == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_router_is_everybodys(number: int, zygote: Zygote, models: dict[str, Path], folder: Path):
    before = {*processes.below(zygote.pid)}
    program = Program(folder, "ends", "--register", f"base={models['base']}", *ARGS)
    assert program.said("base", "greedy")[0] == 200
    started = {*processes.below(zygote.pid), *processes.below(program.process.pid)} - before
    assert len(started) >= 4, "a client, a keeper, a server and an engine core"
    assert program.stop(number) == (-number if number == signal.SIGKILL else 0)
    until(lambda: not any(map(alive, started)), "all processes to end")


def test_weights_are_swapped_in_place(models: dict[str, Path], folder: Path):
    """Packing is left out, as in test_swap.py: by a swap a model gives the answers that it gives freshly started."""
    variables = forks.environment(environment())
    snapshots = {name: folder / f"unpacked-{name}.thaw" for name in ("base", "tuned")}
    for name, path in snapshots.items():
        frozen(models[name], path, variables)
    (folder / "swaps.toml").write_text(toml({name: models[name] for name in snapshots}, snapshots, ARGS, deadline=300))
    program = Program(folder, "swaps", "--models", str(folder / "swaps.toml"), "--zygote", forks.NAME, **variables)
    try:
        base = program.said("base", "logprobs")
        tuned = program.said("tuned", "logprobs")
        assert base[0] == tuned[0] == 200 and base[1]["model"] == "base" and tuned[1]["model"] == "tuned"
        assert tuned[1]["choices"] != base[1]["choices"]
        assert program.said("base", "logprobs") == base
        assert program.admin("models/base/unload", {})[0] == 200
        assert program.said("tuned", "logprobs") == tuned
        changes = re.findall(r"thaw.serve: (started|swapped|lost|swap refused) ", program.log.read_text())
        assert changes == ["started", "swapped", "swapped", "started"]
    finally:
        assert program.stop() == 0
