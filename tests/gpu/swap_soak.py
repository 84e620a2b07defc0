"""A running engine swapped and parked over and over beside requests: no wrong token, and nothing grows.

    python tests/gpu/swap_soak.py MODEL FIRST.thaw SECOND.thaw [--swaps 1000] [--parks 100] [--clients 4] [--seed N]
        [--seconds LIMIT]

Swaps and parks take turns. Requests of random prompts are sent all the time. Each must be ended (``abort``), or
have exactly the tokens that one of both weights gives to that prompt: those that the engine held when it was sent,
unless it was swapped meanwhile. With more than one client set VLLM_BATCH_INVARIANT=1: how requests meet in a step
changes roundings. Prints a JSON document; exit status 1 where something is wrong. Not part of the tests: it takes
minutes, and snapshots of some size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.gpu.growth import growth, median, sizes, summary, too_much

PROMPTS, LENGTH, ANSWER = 24, 14, 8
"""Prompts, and tokens of each and of its answer: within one block, so that none is answered from a cache."""
STARTED = time.monotonic()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("snapshots", nargs=2)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--parks", type=int, default=100)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after this time, the start included; says how far it came"
    )
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON")
    return parser.parse_args()


class Soak:
    def __init__(self, engine: Any, given: argparse.Namespace) -> None:
        self.engine, self.given, self.random = engine, given, random.Random(given.seed)
        self.prompts = [[self.random.randrange(300, 500) for _ in range(LENGTH)] for _ in range(PROMPTS)]
        self.answers: list[list[list[int]]] = []
        self.number = self.held = self.changes = 0
        self.counts = {"right": 0, "ended": 0, "across": 0}
        self.wrong: list[Any] = []
        self.phases: list[dict[str, float]] = []

    async def ask(self, ids: list[int]) -> tuple[list[int], str]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
        self.number += 1
        made: Any = None
        async for output in self.engine.generate({"prompt_token_ids": ids}, sampling, f"soak-{self.number}"):
            made = output.outputs[0]
        return list(made.token_ids), str(made.finish_reason)

    async def client(self, seed: int) -> None:
        """Asks until it is cancelled."""
        draw = random.Random(seed)
        while True:
            which, held, changes = draw.randrange(PROMPTS), self.held, self.changes
            tokens, why = await self.ask(self.prompts[which])
            if why == "abort":
                self.counts["ended"] += 1
                await asyncio.sleep(0.01)
            elif self.changes != changes:  # sent before a change, answered before it or after it
                self.counts["across"] += 1
                if tokens not in (self.answers[0][which], self.answers[1][which]):
                    self.wrong.append(["across", which, tokens])
            elif tokens == self.answers[held][which]:
                self.counts["right"] += 1
            else:
                self.wrong.append([held, which, tokens])

    async def swap(self, number: int, deadline: float) -> float:
        import thaw_vllm

        start = time.perf_counter()
        self.changes += 1
        told = await thaw_vllm.swap_weights_async(self.engine, self.given.snapshots[number], deadline=deadline)
        self.held = number
        self.phases.append(told.seconds)
        self.changes += 1
        return time.perf_counter() - start

    async def park(self) -> tuple[float, float, bool]:
        import thaw_vllm

        start = time.perf_counter()
        self.changes += 1
        parked = await thaw_vllm.park_async(self.engine, deadline=self.random.choice([0, 5]))
        middle = time.perf_counter()
        await thaw_vllm.wake_async(self.engine, parked)
        self.changes += 1
        return middle - start, time.perf_counter() - middle, parked.driver

    async def run(self) -> dict[str, Any]:
        for number in (0, 1):
            if number:
                await self.swap(number, 0)
            self.answers.append([(await self.ask(ids))[0] for ids in self.prompts])
        assert self.answers[0] != self.answers[1], "both snapshots answer alike"
        tasks = [asyncio.create_task(self.client(self.given.seed + n)) for n in range(self.given.clients)]
        seen, swaps, parks = [], [], []
        start = time.monotonic()
        while len(swaps) < self.given.swaps and time.monotonic() < STARTED + self.given.seconds:
            swaps.append(await self.swap(len(swaps) % 2, self.random.choice([0, 0.05, 5])))
            while len(parks) * self.given.swaps < len(swaps) * self.given.parks:
                parks.append(await self.park())
            await asyncio.sleep(self.random.random() * 0.04)
            if len(swaps) % max(1, self.given.swaps // 40) == 0:
                seen.append(sizes(os.getpid()))
            self.check(tasks)
            if len(swaps) % 50 == 0 or self.given.swaps < 50:
                told = f"{len(swaps)} swaps, {len(parks)} parks, {self.counts}, {time.monotonic() - start:.0f} s"
                print(told, file=sys.stderr, flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        grown = growth(seen)
        return {
            "seed": self.given.seed,
            "swaps": summary(swaps),
            "swap_phases": {name: median([one[name] for one in self.phases]) for name in self.phases[0]},
            "park": summary([one[0] for one in parks]),
            "wake": summary([one[1] for one in parks]),
            "by_driver": sum(one[2] for one in parks),
            "requests": self.counts,
            "wrong": self.wrong[:20],
            "grown": grown,
            "sizes": [seen[0], seen[-1]] if seen else [],
            "failed": bool(self.wrong) or too_much(grown),
        }

    def check(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.done():
                task.result()
        if len(self.wrong) > 20:
            raise SystemExit(json.dumps({"seed": self.given.seed, "wrong": self.wrong}))


async def main() -> int:
    given = parse()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args: dict[str, Any] = {
        "load_format": "thaw",
        "model_loader_extra_config": {"snapshot": given.snapshots[0]},
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "enable_sleep_mode": given.parks > 0,
    }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=given.model, **args | given.engine_args))
    try:
        found = await Soak(engine, given).run()
    finally:
        engine.shutdown()
    print(json.dumps(found))
    return int(found["failed"])


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
