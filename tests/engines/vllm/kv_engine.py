"""A vLLM engine in a fresh process that does what a list of steps says: kv_engine.py STEPS.json ANSWERS.json.

The first step makes the engine (``{"do": "engine", ...}`` with vLLM's arguments, ``snapshot`` for thaw's loader). An
error is an answer: ``{"error": its class, "message": its text}``.
"""

import dataclasses
import json
import sys
from pathlib import Path


def engine(arguments):
    if "snapshot" in arguments:
        from thaw_vllm import load

        return load(arguments.pop("model"), arguments.pop("snapshot"), **arguments)
    from vllm import LLM

    return LLM(**arguments)


def ask(llm, step):
    """Greedy answers to lists of token ids: cached tokens, tokens and log-probabilities."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=step.get("max_tokens", 12), logprobs=2)
    salt = {"cache_salt": step["salt"]} if "salt" in step else {}
    prompts = [{"prompt_token_ids": prompt} | salt for prompt in step["prompts"]]
    return [
        {
            "cached": output.num_cached_tokens,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [sorted((t, e.logprob) for t, e in at.items()) for at in output.outputs[0].logprobs],
        }
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def do(llm, step):
    from thaw_vllm import freeze_kv_cache, restore_kv_cache
    from thaw_vllm.engines.vllm.kv.api import kv_cache_info

    what, options = step["do"], {key: value for key, value in step.items() if key != "do"}
    if what == "ask":
        return ask(llm, step)
    if what == "freeze":
        return dataclasses.asdict(freeze_kv_cache(llm, options.pop("path"), **options))
    if what == "restore":
        return dataclasses.asdict(restore_kv_cache(llm, options.pop("path"), **options))
    if what == "info":
        return kv_cache_info(llm, **options)
    if what == "reset":
        return llm.reset_prefix_cache()
    raise ValueError(what)


def main(steps, answers):
    from thaw_vllm.errors import ThawError

    first, *rest = json.loads(Path(steps).read_text())
    assert first.pop("do") == "engine"
    llm, found = engine(first), []
    for step in rest:
        try:
            found.append(do(llm, step))
        except ThawError as error:
            found.append({"error": type(error).__name__, "message": str(error)})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
