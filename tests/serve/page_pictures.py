"""Makes the pictures of the page in the documentation: ``python -m tests.serve.page_pictures docs/images``.

The server is real, the engines behind it are stand-ins; numbers are made up, of a kind that a GPU gives.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tests.serve.chromium import browser
from tests.serve.in_thread import InThread, in_thread
from tests.serve.served import TOKEN, Served
from tests.sessions.made import context, session

from thaw_vllm.errors import ThawError
from thaw_vllm.serve import overview
from thaw_vllm.serve.config import Model
from thaw_vllm.sessions.store import Store

MODELS = [
    Model("llama-3.1-8b", "/m", snapshot="llama-3.1-8b.thaw", share=0.4, pinned=True),
    Model("llama-3.1-8b-support", "/m", snapshot="llama-3.1-8b-support.thaw", share=0.4),
    Model("qwen3-14b", "/m", snapshot="qwen3-14b.thaw", share=0.4),
    Model("qwen3-0.6b", "/m", snapshot="qwen3-0.6b.thaw", share=0.1),
    Model("phi-4-mini", "/m", snapshot="phi-4-mini.thaw", share=0.1),
    Model("gemma-3-4b", "/m", share=0.1),
]
ENGINE = {"engine": "vllm", "engine_version": "0.32.0", "rank": 0}
BYTES = {
    "llama-3.1-8b": 16.06e9,
    "llama-3.1-8b-support": 16.06e9,
    "qwen3-14b": 29.54e9,
    "qwen3-0.6b": 1.19e9,
    "phi-4-mini": 7.67e9,
}
PHASES = [
    *(("process", 0.0, 0.02), ("config", 0.02, 0.46), ("front", 0.46, 0.71), ("engine process", 0.71, 0.78)),
    *(("engine init", 0.78, 1.02), ("device", 1.02, 1.33), ("model init", 1.33, 1.47), ("weights", 1.47, 2.02)),
    *(("profile", 2.02, 2.36), ("compile", 2.36, 2.71), ("KV cache", 2.71, 2.79), ("graphs", 2.79, 3.22)),
    *(("front", 3.22, 3.34), ("first token", 3.34, 3.41)),
]
SESSIONS = [
    ("handbook", None, 0, 18204, 18204, 26.0, None),
    ("refund policy", "handbook", 18204, 18911, 18390, 9.2, "stop"),
    ("plan-a", "refund policy", 18911, 20480, 19004, 3.1, "stop"),
    ("plan-b", "refund policy", 18911, 19730, 19004, 3.1, "stop"),
    ("plan-b, with tools", "plan-b", 19730, 22016, 20110, 1.4, "length"),
    ("plan-c", "refund policy", 18911, 19337, 19004, 3.1, None),
    ("delivery times", "handbook", 18204, 18655, 18402, 0.3, "stop"),
    ("code review", None, 0, 7412, 6930, 49.0, "stop"),
]
"""Label, parent, tokens in common with it, tokens, how many of them were given, hours since, why generating ended."""


def identity(name: str) -> dict[str, Any]:
    drawn = random.Random(name)
    model, content = (f"{drawn.getrandbits(256):064x}" for _ in range(2))
    return {"bytes": int(BYTES.get(name, 4.1e8)), "model": model, "content": content} | ENGINE


def report(pid: int, slower: float) -> None:
    """A report of a start, as a server writes one."""
    folder = Path(os.environ["THAW_STATE_DIR"]) / "starts" / f"20260101-120000-{pid}"
    folder.mkdir(parents=True)
    shared = {"pid": pid, "parent": 1, "name": "MainProcess", "created": 100.0}
    lines = [
        json.dumps(shared | {"phase": phase, "begin": 100 + begin * slower, "end": 100 + end * slower})
        for phase, begin, end in PHASES
    ]
    (folder / f"{pid}.jsonl").write_text("\n".join(lines) + "\n")


def sessions(folder: Path) -> str:
    """A store of records alone, sized as of a model with 8 billion parameters."""
    store, made = Store(folder / "sessions", create=True), context(page=4 * 131072 - 32)
    tokens: dict[str | None, list[int]] = {None: []}
    ids: dict[str | None, str | None] = {None: None}
    drawn = random.Random(3)
    for label, parent, fork, count, prompt, hours, finished in SESSIONS:
        tokens[label] = tokens[parent][:fork] + [drawn.randrange(128000) for _ in range(count - fork)]
        more: dict[str, Any] = {"parent": ids[parent], "fork": fork} if parent else {}
        more |= {"prompt": prompt, "finished": finished, "created": time.time() - 3600 * hours}
        with store.use():
            ids[label] = store.publish(session(tokens[label], contexts=[made], labels=[label], **more), [made])
    return str(store.directory)


def count(running: InThread, stopped: threading.Event) -> None:
    """What engines have computed grows."""
    drawn, at = random.Random(1), 0.0
    while not stopped.wait(0.5):
        at += 0.5
        for number, engine in enumerate(running.served.engines):
            busy = (1900, 850, 400, 620)[number % 4] * (0.8 + 0.3 * drawn.random() + 0.2 * (int(at / 7 + number) % 3))
            read = busy * (2.5 + number % 3)
            grown = {
                "generation_tokens_total": busy / 2,
                "prompt_tokens_total": read,
                "prefix_cache_queries_total": read,
                "prefix_cache_hits_total": read * (0.81, 0.46, 0.93, 0.2)[number % 4],
            }
            for name, value in grown.items():
                engine.counted[f"vllm:{name}"] = engine.counted.get(f"vllm:{name}", 1000) + value
            engine.counted["vllm:kv_cache_usage_perc"] = 0.2 + 0.1 * (number % 4) + 0.05 * drawn.random()


def main(target: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="thaw-page-"))
    os.environ["THAW_STATE_DIR"] = str(folder / "state")
    (folder / "kv").mkdir()
    for name in ("system-prompt.thawkv", "handbook.thawkv"):
        (folder / "kv" / name).touch()
    overview.described = lambda path: identity(path.stem)
    directories = {"kv_directory": str(folder / "kv"), "sessions_directory": sessions(folder)}
    served = Served(folder, *MODELS, given={"seconds": 0.4, "parkable": True}, **directories)
    served.grace, make = 1, served.pool._changes._make

    def made(model: Model) -> Any:
        engine = make(model)
        engine.pid += 41300
        engine.seconds = {"llama-3.1-8b": 3.3, "qwen3-14b": 0.9}.get(model.name, 0.5)
        if model.name.startswith("gemma"):
            engine.faults = {"start": ThawError("its server ended with 1: No available memory for the cache blocks")}
        if model.name == "llama-3.1-8b-support":
            engine.swappable = {"llama-3.1-8b-support", "qwen3-14b"}
        report(engine.pid, {"llama-3.1-8b": 1.0, "qwen3-0.6b": 0.62}.get(model.name, 1.3))
        return engine

    served.pool._changes._make = made
    stopped = threading.Event()
    with in_thread(served) as running, browser() as chromium:
        counting = threading.Thread(target=count, args=(running, stopped))
        counting.start()
        page = chromium.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        page.goto(f"{served.url}/thaw")
        page.get_by_label("Admin token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_text("live", exact=True).wait_for()
        for name in ("llama-3.1-8b", "qwen3-0.6b", "llama-3.1-8b-support", "phi-4-mini"):
            running.post(f"/v1/thaw/models/{name}/load")
        running.post("/v1/thaw/models/phi-4-mini/park")
        running.post_soon("/v1/thaw/models/gemma-3-4b/load")
        for number in range(5):
            body = {"model": MODELS[0].name, "chunks": ["x"] * 4000, "pause": 0.02 + number / 100}
            running.post_soon("/v1/completions", body)
        time.sleep(float(os.environ.get("SECONDS_OF_LINES", "90")))
        for engine in served.engines:
            engine.seconds = 6.0
        running.post_soon("/v1/completions", {"model": "qwen3-14b"})
        time.sleep(1.6)
        Path(target).mkdir(parents=True, exist_ok=True)
        shoot(page, target)
        stopped.set()
        counting.join()


def shoot(page: Any, target: str) -> None:
    for name, scheme, width, height in (
        ("light", "light", 1280, 1180),
        ("dark", "dark", 1280, 1180),
        ("phone", "light", 375, 812),
    ):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        smaller(page.screenshot(), f"{target}/page-{name}.png")
    page.set_viewport_size({"width": 1120, "height": 1180})
    for label in ("plan-a", "plan-b, with tools"):
        page.get_by_role("treeitem").filter(has=page.get_by_text(label, exact=True)).click()
    page.get_by_role("button", name="Show tokens").click()
    page.locator("#comparison dl code").first.wait_for()
    page.mouse.move(0, 0)
    smaller(page.locator("#sessions").screenshot(), f"{target}/page-sessions.png")
    if "WHOLE" in os.environ:
        page.screenshot(path=f"{target}/whole-phone.png", full_page=True)
        page.set_viewport_size({"width": 1280, "height": 900})
        page.wait_for_timeout(300)
        page.screenshot(path=f"{target}/whole.png", full_page=True)


def smaller(picture: bytes, path: str) -> None:
    """Save one with few colours."""
    opened = Image.open(io.BytesIO(picture)).convert("RGB")
    opened.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
