"""An AsyncLLM that streams answers while its cache is frozen: ``kv_load.py ARGUMENTS.json ANSWER.json``.

The arguments: ``engine`` (vLLM's), ``prompts``, ``max_tokens``, ``path``, ``model_id``; ``control``: ask once more
without a freeze, since tokens of 16 bits can differ when requests are put together otherwise. The answer: the tokens of
every request with and without the freeze, the 99th percentiles of the seconds between two tokens, and the reports.
"""

import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path


async def stream(engine, name, prompt, max_tokens, gaps):
    """Tokens of one request; seconds between them are added to ``gaps``."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    tokens, last = [], None
    async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        tokens, last = list(output.outputs[0].token_ids), now
    return tokens


async def run(asked):
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from thaw_vllm import freeze_kv_cache_async

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**asked["engine"]))

    async def round_of(name, beside=None):
        await engine.reset_prefix_cache()
        gaps = []
        streams = [
            asyncio.create_task(stream(engine, f"{name}-{number}", prompt, asked["max_tokens"], gaps))
            for number, prompt in enumerate(asked["prompts"])
        ]
        extra = [] if beside is None else await beside(streams)
        tokens = await asyncio.gather(*streams)
        return tokens, sorted(gaps)[int(len(gaps) * 0.99)], extra

    async def freezing(streams):
        reports = []
        await asyncio.sleep(0.2)
        while not all(task.done() for task in streams):
            report = await freeze_kv_cache_async(engine, asked["path"], model_id=asked["model_id"], force=True)
            reports.append(dataclasses.asdict(report))
            await asyncio.sleep(0.05)
        return reports

    await round_of("warm-up")
    alone, alone_gap, _ = await round_of("alone")
    control = (await round_of("control"))[0] if asked.get("control") else None
    beside, beside_gap, reports = await round_of("beside", freezing)
    engine.shutdown()
    gaps = [alone_gap, beside_gap]
    return {"alone": alone, "control": control, "beside": beside, "gaps": gaps, "reports": reports}


if __name__ == "__main__":
    arguments, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(asyncio.run(run(json.loads(arguments.read_text())))))
