"""A vLLM engine in a fresh process that does what a list of steps says: kv_engine.py STEPS.json ANSWERS.json.

The first step makes the engine (``{"do": "engine", ...}`` with vLLM's arguments, ``snapshot`` for thaw's loader), if
the others need one. An error is an answer: ``{"error": its class, "message": its text}``.
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
    found = []
    for prompt in prompts:  # one by one: how requests share steps depends on time, and roundings on that
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
        found.append(answered(output))
    return found


def answered(output):
    """Cached tokens, tokens and log-probabilities of an answer."""
    own = output.outputs[0]
    return {
        "cached": output.num_cached_tokens,
        "tokens": list(own.token_ids),
        "logprobs": [sorted([t, e.logprob] for t, e in at.items()) for at in own.logprobs or []],
        "ended": [own.finish_reason, own.stop_reason],
    }


def cuts(llm, prompts, kinds, at, store, **about):
    """Answers under several kinds of sampling parameters, each kept and cut at some tokens, and resumed at once.

    Under ``stop`` the parameters get a stop string of their own for each cut, half of which is before it.
    """
    from vllm import SamplingParams

    from thaw_vllm import checkpoint, resume
    from thaw_vllm.sessions.branch import branch
    from thaw_vllm.sessions.store import Store

    found, tokenizer = [], llm.get_tokenizer()

    def generated(prompt, values):
        return llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**values), use_tqdm=False)[0]

    def stopped(values, cut):
        for prompt in prompts:
            tokens = generated(prompt, values).outputs[0].token_ids
            text = tokenizer.decode(tokens[cut - 1 : cut + 1])
            output = generated(prompt, values | {"stop": [text]})
            if len(output.outputs[0].token_ids) == cut + 1:
                return values | {"stop": [text]}, output
        raise AssertionError(f"each prompt's answer has this stop string before {cut}")

    for kind, given in kinds.items():
        output = None if kind == "stop" else generated(prompts[0], given)
        for cut in at[kind]:
            values = given
            if kind == "stop":
                values, output = stopped(given, cut)
            kept = checkpoint(llm, output, sampling_params=SamplingParams(**values), store=store, **about)
            label = f"{kind} {cut}"
            branch(Store(store), kept.session, len(output.prompt_token_ids) + cut, labels=[label])
            living, there = resume(llm, label, store=store, **about)
            whole = answered(output)
            rest = whole | {name: whole[name][cut:] for name in ("tokens", "logprobs")}
            found.append({"session": label, "rest": rest, "living": answered(living), "inexact": there.inexact})
    return found


def schedule(llm, tokens, generated):
    """How the scheduler of an engine in this process hands a request to the V2 runner, which the CPU lacks."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from thaw_vllm.engines.vllm.sessions.sampling import GENERATED

    core = llm.llm_engine.engine_core.engine_core
    core.scheduler.use_v2_model_runner = True
    asked = EngineCoreRequest(
        request_id="rest",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=10, extra_args={GENERATED: [generated, len(tokens)]}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core.add_request(*core.preprocess_add_request(asked))
    made = core.scheduler.schedule()
    (new,) = made.scheduled_new_reqs
    stats = core.scheduler.requests["rest"].take_prefill_stats()
    return {
        "prompt": new.prompt_token_ids,
        "prefill": new.prefill_token_ids,
        "computed": new.num_computed_tokens,
        "scheduled": made.num_scheduled_tokens["rest"],
        "max_tokens": new.sampling_params.max_tokens,
        "stats": [stats.num_prompt_tokens, stats.num_local_cached_tokens],
    }


def checkpoint(llm, options):
    """Generate with these sampling parameters, and keep that; without, keep the token ids alone."""
    from vllm import SamplingParams

    from thaw_vllm import checkpoint

    tokens, sampling, found = options.pop("tokens"), options.pop("sampling", None), None
    if sampling is not None:
        salt = {"cache_salt": options["cache_salt"]} if "cache_salt" in options else {}
        params = SamplingParams(**sampling)
        (output,) = llm.generate([{"prompt_token_ids": tokens} | salt], params, use_tqdm=False)
        found, tokens, options = answered(output), output, options | {"sampling_params": params}
    return {"answer": found} | dataclasses.asdict(checkpoint(llm, tokens, **options))


def fork(llm, options):
    """Branches in the order of their numbers; the beginning is a session where it is named."""
    from vllm import SamplingParams

    from thaw_vllm import checkout, fork

    params = SamplingParams(**options.pop("sampling"))
    beginning = options.pop("tokens", None)
    if beginning is None:
        about = {name: options[name] for name in ("store", "model_id") if name in options}
        beginning = checkout(llm, options.pop("session"), sampling_params=params, **about)
    left = options.pop("leave", False)
    branches = fork(llm, beginning, options.pop("n"), params, **options)
    if left:  # as a caller that has seen enough
        found = [next(branches)]
        branches.close()
    else:
        found = sorted(branches, key=lambda one: one.number)
    told = [{"number": one.number, "parent": one.parent, "session": one.session} for one in found]
    return [about | {"answer": answered(one.output)} for about, one in zip(told, found, strict=True)]


def resume(llm, options):
    """Go on with a session, or only bring it back where nothing is to be generated."""
    from vllm import SamplingParams

    from thaw_vllm import checkout, resume

    sampling = options.pop("sampling", None)
    if sampling is not None:
        options["sampling_params"] = SamplingParams(**sampling)
    if options.pop("only", False):
        output, there = None, checkout(llm, **options)
    else:
        output, there = resume(llm, **options)
    there = {name: value for name, value in vars(there).items() if name not in ("prompt", "sampling_params")}
    return {"answer": None if output is None else answered(output)} | there


def interleave(llm, folder, prompts, seeds, length, model_id):
    """Random freezing, restoring, evicting and asking, against what must hold after each.

    Every answer is that of a cold engine; every block that a restore brought has the bytes of its file; all blocks but
    the null block are free again; nothing that was cached is lost to a restore that may not evict.
    """
    import random

    from thaw_vllm import freeze_kv_cache, restore_kv_cache
    from thaw_vllm.bench.kv_pages import pages_by_address
    from thaw_vllm.engines.vllm.kv.api import kv_cache_info
    from thaw_vllm.errors import UsageError

    def answers(prompt):
        return ask(llm, {"prompts": [prompt], "max_tokens": 4})[0]["tokens"]

    def cached():
        found = kv_cache_info(llm, model_id=model_id)
        assert found["free"] == found["blocks"] - 1, found
        return found["cached"]

    llm.reset_prefix_cache()
    cold = []
    for prompt in prompts:
        cold.append(answers(prompt))
        llm.reset_prefix_cache()
    counts = {"ask": 0, "freeze": 0, "restore": 0, "evict": 0, "left out": 0}
    for seed in seeds:
        rng, files = random.Random(seed), []
        llm.reset_prefix_cache()
        for number in range(length):
            before = cached()
            what = rng.choice(["ask", "ask", "freeze", "restore", "restore", "evict"])
            if what == "ask":
                chosen = rng.randrange(len(prompts))
                assert answers(prompts[chosen]) == cold[chosen], (seed, number, chosen)
            elif what == "freeze":
                path = str(Path(folder) / f"{seed}-{number}.thawkv")
                some = rng.choice([None, [rng.choice(prompts)], prompts])
                try:
                    freeze_kv_cache(llm, path, token_ids=some, model_id=model_id)
                    files.append(path)
                except UsageError as error:
                    assert "nothing to freeze" in str(error)
            elif what == "evict" and rng.random() < 0.3:
                assert llm.reset_prefix_cache()
            elif files:
                path, evict = rng.choice(files), what == "evict"
                done = restore_kv_cache(llm, path, evict=evict, model_id=model_id)
                assert evict or cached() == before + done.blocks, (seed, number)
                counts["left out"] += done.left_out
                if done.blocks + done.present:
                    after = Path(folder) / "after.thawkv"
                    freeze_kv_cache(llm, after, force=True, model_id=model_id)
                    mine, theirs = pages_by_address(after), pages_by_address(path)
                    both = mine.keys() & theirs.keys()
                    assert both, (seed, number)
                    if done.present == 0:
                        assert all(mine[name] == theirs[name] for name in both), (seed, number)
            counts[what] += 1
        for path in files:
            Path(path).unlink()
    return counts


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
    if what == "checkpoint":
        return checkpoint(llm, options)
    if what == "fork":
        return fork(llm, options)
    if what == "schedule":
        return schedule(llm, **options)
    if what == "cuts":
        return cuts(llm, **options)
    if what == "branch":
        from thaw_vllm.sessions.branch import branch
        from thaw_vllm.sessions.store import Store

        return branch(Store(options.pop("store")), **options)
    if what == "resume":
        return resume(llm, options)
    if what == "info":
        return kv_cache_info(llm, **options)
    if what == "reset":
        return llm.reset_prefix_cache()
    if what == "call":
        try:
            llm.collective_rpc(options["method"])
        except Exception as error:  # whether there is such a method is not the point
            return str(error)
        return None
    if what == "abandon":  # as a caller that goes away, and a request that comes next
        import time

        from thaw_vllm.engines.vllm.client import call

        asked = {"path": options["path"], "prefixes": None, "force": True, "background": True}
        assert "job" in call(llm, "thaw_kv_freeze", asked)
        while not Path(options["path"]).exists():
            time.sleep(0.02)
        time.sleep(0.5)
        return [kv_cache_info(llm), ask(llm, {"prompts": [[3, 4, 5]], "max_tokens": 1}) and kv_cache_info(llm)]
    if what == "fill":  # as if another freeze had taken the file's place since its table was read
        from thaw_vllm.weights.open import open_snapshot

        with open_snapshot(options["path"]) as opened:
            header = opened.snapshot.header
        layout = {name: value for name, value in header.kv.to_json().items() if name != "regions"}
        asked = {"path": options["path"], "model": header.identity.model, "layout": layout, "slots": [0], "ids": [1]}
        asked |= {"blocks": kv_cache_info(llm)["blocks"], "freeze": options["freeze"] or header.content}
        return llm.collective_rpc("thaw_kv_fill", args=(asked,))
    if what == "load":
        from thaw_vllm import load

        return type(load(None, **options)).__name__
    if what == "reports":
        return llm.collective_rpc("thaw_report")
    if what == "executor":
        return type(llm.llm_engine.model_executor).__name__
    if what == "random":
        return interleave(llm, **options)
    raise ValueError(what)


def main(steps, answers):
    from thaw_vllm.errors import ThawError

    first, *rest = json.loads(Path(steps).read_text())
    llm, found = None, []
    if first["do"] == "engine":
        llm = engine({name: value for name, value in first.items() if name != "do"})
    else:
        rest = [first, *rest]
    for step in rest:
        try:
            found.append(do(llm, step))
        except ThawError as error:
            found.append({"error": type(error).__name__, "message": str(error)})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
