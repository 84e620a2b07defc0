"""A pool that switches over and over beside requests, on a GPU: no answer of another model's, and nothing grows.

    python tests/gpu/pool_soak.py models.toml [--switches 1000] [--clients 3] [--seldom NAME=SHARE | --steady NAME]
                                              [--beside] [--seed N] [--seconds LIMIT]

The models of the file are asked at random, several requests at a time, the next one always another than the last: those
that can take one another's weights are swapped, others parked and woken, or started anew. Each answer must be the one
that its model gave when it was asked alone at first, log-probabilities included: set VLLM_BATCH_INVARIANT=1, since how
requests meet in a step changes roundings. Prints a JSON document; exit status 1 where something is wrong. Not part of
the tests: it takes minutes, and snapshots of some size (``fine_tunes.py`` makes them).

With ``--steady`` one model is not among those that take turns, but asked all the time, one request after another:
first alone, then while the others switch. It has an engine of its own, and its seconds say what switches cost it.

Several pools may do this side by side, each with --beside and a zygote of its own (THAW_ZYGOTE_DIR).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp
from tests.gpu.growth import growth, sizes, summary, too_much, whose

from thaw_vllm.zygote.processes import below

STARTED = time.monotonic()
CHANGE = re.compile(r"thaw\.serve: (started|swapped|parked|woken|lost|failed|swap refused) (.*)")
PROMPTS, LENGTH, ANSWER = 12, 60, 8
QUIET = 300
"""Requests to the steady model before others switch."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models")
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seldom", default="", metavar="NAME=SHARE", help="choose this model with that probability")
    parser.add_argument("--steady", default="", metavar="NAME", help="ask this model all the time instead")
    parser.add_argument("--beside", action="store_true", help="others use this GPU, too")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time, the start included")
    return parser.parse_args()


class Soak:
    def __init__(self, given: argparse.Namespace, pids: list[int], log: Path, client: aiohttp.ClientSession) -> None:
        self.given, self.pids, self.log, self.client = given, pids, log, client
        self.read = 0
        name, _, share = given.seldom.partition("=")
        self.seldom, self.share = name, float(share or 0.1)
        self.seconds: dict[str, list[float]] = {}
        self.random = random.Random(given.seed)
        self.prompts = [[self.random.randrange(300, 500) for _ in range(LENGTH)] for _ in range(PROMPTS)]
        self.wrong: list[Any] = []
        self.random_steady = random.Random(given.seed + 1)
        self.asked: list[tuple[float, float, float]] = []

    async def ask(self, model: str, prompt: list[int]) -> tuple[str, float]:
        """What was said, and when the first of it was there."""
        body = {"model": model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "logprobs": 1, "stream": True}
        start, first, text, values = time.perf_counter(), 0.0, "", []
        async with self.client.post("/v1/completions", json=body | {"ignore_eos": True}) as answer:
            if answer.status != 200:
                return f"{answer.status}: {await answer.text()}", 0.0
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - start
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["text"]
                    values += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        return json.dumps([text, values]), first  # how many tokens a chunk has depends on time

    def changes(self) -> list[str]:
        """What the pool has told since the last call."""
        with self.log.open("rb") as stream:
            stream.seek(self.read)
            text = stream.read()
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        found = CHANGE.findall(text.decode())
        for what, more in found:
            if (took := re.search(r"seconds=([0-9.]+)", more)) is not None:
                self.seconds.setdefault(what, []).append(float(took[1]))
        return [what for what, _ in found]

    def another(self, names: list[str], last: str) -> str:
        """The next model."""
        others = [name for name in names if name != last]
        rest = (1 - self.share) / max(1, len(others) - 1)
        weights = [self.share if name == self.seldom else rest for name in others]
        return self.random.choices(others, weights if self.seldom in others else None)[0]

    async def steady(self, alone: list[str]) -> None:
        """One request after another to the steady model, until it is cancelled."""
        while True:
            one, start = self.random_steady.randrange(PROMPTS), time.perf_counter()
            said, first = await self.ask(self.given.steady, self.prompts[one])
            self.asked.append((start, first, time.perf_counter() - start))
            if said != alone[one]:
                self.wrong.append([self.given.steady, one, said])

    def told_steady(self, begun: float) -> dict[str, Any]:
        """Seconds to the first token and to the last, before others began to switch and meanwhile."""
        parts = {
            "quiet": [one for one in self.asked if one[0] + one[2] <= begun],
            "meanwhile": [one for one in self.asked if one[0] > begun],
        }
        return {
            when: {
                name: summary(times) | {"p99": sorted(times)[int(0.99 * len(times))]}
                for name, times in (("first", [one[1] for one in found]), ("whole", [one[2] for one in found]))
            }
            for when, found in parts.items()
            if found
        }

    async def run(self) -> dict[str, Any]:
        async with self.client.get("/v1/models") as answer:
            names = [one["id"] for one in (await answer.json())["data"]]
        alone = {name: [(await self.ask(name, prompt))[0] for prompt in self.prompts] for name in names}
        assert not self.seldom or self.seldom in names, f"there is no model {self.seldom!r}"
        assert len({json.dumps(said) for said in alone.values()}) == len(names), "models answer alike"
        steady = None
        if self.given.steady:
            names.remove(self.given.steady)
            steady = asyncio.create_task(self.steady(alone[self.given.steady]))
            while len(self.asked) < QUIET and not steady.done():
                await asyncio.sleep(0.01)
        begun = time.perf_counter()
        seen: list[dict[str, float]] = []
        firsts: list[float] = []
        ways: dict[str, list[float]] = {}
        last = names[-1]
        print(f"asked alone, {time.monotonic() - STARTED:.0f} s", *self.changes(), file=sys.stderr, flush=True)
        while len(firsts) < self.given.switches and time.monotonic() < STARTED + self.given.seconds:
            last = self.another(names, last)
            which = [self.random.randrange(PROMPTS) for _ in range(self.given.clients)]
            found = await asyncio.gather(*(self.ask(last, self.prompts[one]) for one in which))
            for one, (said, _) in zip(which, found, strict=True):
                if said != alone[last][one]:
                    self.wrong.append([last, one, said])
            firsts.append(max(first for _, first in found))
            ways.setdefault(" ".join(self.changes()), []).append(firsts[-1])
            every = max(1, self.given.switches // 40)
            if last != self.seldom and len(firsts) >= every * len(seen):  # engines are not of one size
                seen.append(await asyncio.to_thread(sizes, *self.pids))
            if len(firsts) % 25 == 0:
                print(f"{len(firsts)} switches, {len(self.wrong)} wrong", file=sys.stderr, flush=True)
            if len(self.wrong) > 20:
                break
        if steady is not None:
            steady.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await steady
        grown = growth(seen)
        if self.given.beside and not whose([pid for root in self.pids for pid in (root, *below(root))]):
            grown.pop("gpu_mib", None)
        return {
            "seed": self.given.seed,
            "first_token": summary(firsts),
            "by_way": {way: summary(times) for way, times in sorted(ways.items())},
            "changes": {what: summary(times) for what, times in sorted(self.seconds.items())},
            **({} if steady is None else {"steady": self.told_steady(begun)}),
            "wrong": self.wrong[:20],
            "grown": grown,
            "sizes": [seen[0], seen[-1]] if seen else [],
            "failed": bool(self.wrong) or too_much(grown),
        }


def zygote() -> list[int]:
    """The process that engines are forked from; none where there is no zygote."""
    command = [sys.executable, "-m", "thaw_vllm", "zygote", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [] if done.returncode else [json.loads(done.stdout)["pid"]]


async def main() -> int:
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "thaw_vllm", "serve", "--models", given.models, "--port", "0"]
        with log.open("ab") as stream:
            process = await asyncio.create_subprocess_exec(*command, stdout=stream, stderr=stream)
        try:
            while (ready := re.search(rb"ready at (\S+);", log.read_bytes())) is None:
                assert process.returncode is None, log.read_bytes().decode()[-3000:]
                await asyncio.sleep(0.1)
            timeout = aiohttp.ClientTimeout(total=600)
            async with aiohttp.ClientSession(ready[1].decode(), timeout=timeout) as client:
                found = await Soak(given, [process.pid, *zygote()], log, client).run()
        finally:
            process.terminate()
            await process.wait()
        lost = [line.decode() for line in log.read_bytes().splitlines() if b" lost " in line or b" failed " in line]
    print(json.dumps(found | {"told": lost[:5]}))
    return int(found["failed"])


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
