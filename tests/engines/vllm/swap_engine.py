"""An engine in a fresh process whose weights are swapped, and which is parked: swap_engine.py ASKED.json ANSWER.json.

Asked for are ``model``, the snapshots ``first``, ``second``, ``others`` (by name, to be refused) and ``corrupt``, what
to ``start`` from where it is not the first, ``engine_args``, how many ``cycles``, whether to ``park``, and whether the
engine is ``asynchronous``. The answer has what came of each step, for the test to judge.
"""

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

PROMPTS = [[5 + number % 50 for number in range(100)], [7, 8, 9], [3 + number * 3 % 60 for number in range(70)]]


def sampling(**more):
    from vllm import SamplingParams

    return SamplingParams(**({"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False} | more))


def ask(llm):
    """Tokens and log-probabilities, one prompt at a time, and how many tokens of all were cached."""
    found, cached = [], 0
    for ids in PROMPTS:
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling(logprobs=1), use_tqdm=False)
        made = output.outputs[0]
        found.append(
            [
                list(made.token_ids),
                [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)],
            ]
        )
        cached += output.num_cached_tokens or 0
    return {"answers": found, "cached": cached}


def digests(llm):
    """Of all ranks: the first under its own names, others with theirs before."""
    ranks = llm.collective_rpc("thaw_test_digests")
    names = ["", *(f"rank {rank}: " for rank in range(1, len(ranks)))]
    return {name + path: told for name, of in zip(names, ranks, strict=True) for path, told in of.items()}


def refused(work):
    from thaw_vllm.errors import ThawError

    try:
        return {"did": str(work())}
    except ThawError as error:
        return {"error": type(error).__name__, "message": str(error)}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def swapping(asked):
    import thaw_vllm
    from thaw_vllm.engines.vllm.kv.api import kv_cache_info

    llm = thaw_vllm.load(asked["model"], asked.get("start", asked["first"]), **asked["engine_args"])
    found = {"first": ask(llm), "again": ask(llm), "digests": digests(llm), "cycles": [], "parks": []}
    pids = llm.collective_rpc("thaw_test_pid")
    found["refused"] = {
        name: refused(partial(thaw_vllm.swap_weights, llm, path)) for name, path in asked["others"].items()
    }
    found["after_refusals"] = [ask(llm), digests(llm)]
    found["check"] = asdict(thaw_vllm.check_swap(llm, asked["second"]))
    for number in range(asked["cycles"]):
        for which in ("second", "first"):
            if number % 2:
                thaw_vllm.pin_snapshot(llm, asked[which])
            report = asdict(thaw_vllm.swap_weights(llm, asked[which], verify=number % 3 != 2))
            told = {"which": which, "report": report, "model": kv_cache_info(llm)["model"]}
            found["cycles"].append(told | ask(llm) | {"digests": digests(llm)})
    if asked["park"]:
        for number in range(asked["park"]):
            ask(llm)
            kv = f"{asked['second']}.{number}.thawkv" if number % 2 else None
            parked = thaw_vllm.park(llm, kv=kv, force=True, driver=None if number < asked["park"] - 1 else False)
            gone = Path(asked["first"]).rename(asked["first"] + ".gone")
            lost = refused(partial(thaw_vllm.wake, llm, parked))
            Path(asked["first"]).write_bytes(gone.read_bytes()[:-1])
            cut = refused(partial(thaw_vllm.wake, llm, parked))
            gone.rename(asked["first"])
            woken = thaw_vllm.wake(llm, parked)
            told = {"parked": asdict(parked), "lost": lost, "cut": cut, "woken": asdict(woken)}
            found["parks"].append(told | ask(llm) | {"digests": digests(llm)})
        kept = thaw_vllm.park(llm, keep_weights=True)
        woken = thaw_vllm.wake(llm, kept)
        found["kept"] = {"parked": asdict(kept), "woken": asdict(woken)} | ask(llm) | {"digests": digests(llm)}
    found["broken"] = refused(lambda: thaw_vllm.swap_weights(llm, asked["corrupt"]))
    try:
        found["after"] = str(ask(llm))
    except Exception as error:
        found["after"] = type(error).__name__
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    found["alive"] = [pid for pid in pids if alive(pid) and pid != os.getpid()]
    return found


async def asynchronous(asked):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import thaw_vllm

    extra = {"snapshot": asked["first"]}
    args = {"load_format": "thaw", "model_loader_extra_config": extra} | asked["engine_args"]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=asked["model"], **args))
    numbers = iter(range(10_000))

    async def one(ids, **more):
        made = None
        async for output in engine.generate({"prompt_token_ids": ids}, sampling(**more), f"r{next(numbers)}"):
            made = output.outputs[0]
        return [list(made.token_ids), made.finish_reason]

    async def each():
        return [await one(ids) for ids in PROMPTS]

    found = {"first": await each()}
    long = {"max_tokens": asked["long"]}
    found["alone"] = await one(PROMPTS[1], **long)
    # Some run when the swap is asked for, and may end; others come while it goes on.
    running = [asyncio.create_task(one(PROMPTS[1], **long)) for _ in range(2)]
    await asyncio.sleep(asked["begun"])
    swap = asyncio.create_task(thaw_vllm.swap_weights_async(engine, asked["second"], deadline=600))
    await asyncio.sleep(0.05)
    late = asyncio.create_task(one(PROMPTS[0]))
    found["patient"] = asdict(await swap)
    found["running"], found["late"] = [await task for task in running], await late
    found["second"] = await each()
    # Nobody is waited for.
    running = [asyncio.create_task(one(PROMPTS[1], **long)) for _ in range(2)]
    await asyncio.sleep(asked["begun"])
    found["at once"] = asdict(await thaw_vllm.swap_weights_async(engine, asked["first"], deadline=0))
    found["ended"] = [await task for task in running]
    found["back"] = await each()
    # Refused: those that run go on.
    running = asyncio.create_task(one(PROMPTS[1], **long))
    await asyncio.sleep(0.1)
    try:
        await thaw_vllm.swap_weights_async(engine, asked["others"]["template"], deadline=0)
        found["refused"] = "it was not"
    except thaw_vllm.errors.ThawError as error:
        found["refused"] = type(error).__name__
    found["unharmed"] = await running
    # A caller that goes away.
    swap = asyncio.create_task(thaw_vllm.swap_weights_async(engine, asked["second"], deadline=600))
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    swap.cancel()
    found["cancelled"] = [swap.cancelling() if hasattr(swap, "cancelling") else 1]
    await asyncio.sleep(asked["settle"])
    found["after_cancel"] = await each()
    if asked["park"]:
        running = asyncio.create_task(one(PROMPTS[1], **long))
        await asyncio.sleep(0.1)
        parked = await thaw_vllm.park_async(engine, deadline=0)
        found["parked_running"] = await running
        found["parked"] = asdict(parked)
        found["woken"] = asdict(await thaw_vllm.wake_async(engine, parked))
        found["after_wake"] = await each()
    # Half-way: whoever waits for an answer is told.
    swap = asyncio.create_task(thaw_vllm.swap_weights_async(engine, asked["corrupt"], deadline=0))
    waiting = []
    while not swap.done() and len(waiting) < 50:
        waiting.append(asyncio.create_task(one(PROMPTS[0])))
        await asyncio.sleep(0.005)
    try:
        await swap
        found["broken"] = "it was not"
    except thaw_vllm.errors.ThawError as error:
        found["broken"] = type(error).__name__
    _, pending = await asyncio.wait(waiting, timeout=60)
    found["left waiting"] = len(pending)
    return found


def main(asked, answer):
    asked = json.loads(Path(asked).read_text())
    found = asyncio.run(asynchronous(asked)) if asked["asynchronous"] else swapping(asked)
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
