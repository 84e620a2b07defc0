"""A fresh process that starts vLLM, answers questions and says how long each phase took.

Run as ``python -m thaw_vllm.engines.vllm.ask REQUEST.json ANSWER.json``; the demo and the tests start it, so that what
is compared are processes that share nothing but files.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Read a request, write the answer.

    The request holds ``started`` (``time.time()`` of the parent just before it started this process), ``action``
    (one of those below), ``model`` (or null), ``snapshot`` (or null for vLLM's default loader),
    ``engine_args``, ``questions`` (chat messages' texts, or lists of token ids), ``max_tokens`` and maybe ``caches`` (a
    file of caches that was packed here, to be unpacked first); for ``kv`` also ``kv``: the file's ``path``, whether
    to ``freeze`` it (else it is restored), and the ``model_id``; for ``fork`` and ``rollouts`` ``fork``, which
    ``sessions/showing.py`` and ``sessions/rolling.py`` know.
    """
    entered = time.time()
    request = json.loads(Path(request_path).read_text())
    seconds = {"process": entered - request["started"]}
    actions = {"freeze": _freeze, "ask": _ask, "kv": _kv, "fork": _fork, "rollouts": _roll}
    answer = actions[request["action"]](request, seconds)
    Path(answer_path).write_text(json.dumps(answer | {"seconds": seconds}))


def _freeze(request: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    import dataclasses

    start = time.perf_counter()
    import vllm  # noqa: F401

    seconds["imports"] = time.perf_counter() - start
    from .api import freeze_checkpoint

    start = time.perf_counter()
    reports = freeze_checkpoint(request["model"], request["snapshot"], force=True, **request["engine_args"])
    seconds["freeze"] = time.perf_counter() - start
    return {"reports": [dataclasses.asdict(report) for report in reports]}


def _engine(request: dict[str, Any], seconds: dict[str, float]) -> Any:
    start = time.perf_counter()
    from vllm import LLM

    seconds["imports"] = time.perf_counter() - start
    if (caches := request.get("caches")) is not None:
        _bring(caches, seconds)
    start = time.perf_counter()
    if request["snapshot"] is None:
        llm = LLM(model=request["model"], **request["engine_args"])
    else:
        from .api import load

        llm = load(request["model"], request["snapshot"], **request["engine_args"])
    seconds["engine"] = time.perf_counter() - start
    return llm


def _bring(file: str, seconds: dict[str, float]) -> None:
    """Caches that were packed here, whose use is what is looked at: without them this is an error."""
    import os

    from ...errors import MismatchError
    from .caches import bring

    start = time.perf_counter()
    brought = bring(file, "own", os.environ, report=os.environ.get("THAW_START_REPORT"))
    if not brought.used:
        raise MismatchError(brought.said)
    os.environ.update(brought.environment)
    seconds["caches"] = time.perf_counter() - start


def _fork(request: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """A conversation that is forked, or a branch of it that is taken up."""
    from .sessions.showing import again, begin

    llm, asked = _engine(request, seconds), request["fork"]
    return {"reports": []} | (again if "session" in asked else begin)(llm, asked, seconds)


def _roll(request: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """A prompt that is forked into rollouts."""
    from .sessions.rolling import roll

    return {"reports": []} | roll(_engine(request, seconds), request["fork"], seconds)


def _ask(request: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    llm = _engine(request, seconds)
    from vllm import SamplingParams

    def generate(questions: list[Any], max_tokens: int) -> list[Any]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1)
        outputs: list[Any] = []
        for question in questions:
            if isinstance(question, str):
                outputs += llm.chat([{"role": "user", "content": question}], sampling, use_tqdm=False)
            else:
                outputs += llm.generate([{"prompt_token_ids": question}], sampling, use_tqdm=False)
        return outputs

    start = time.perf_counter()
    generate(request["questions"][:1], 1)
    seconds["first_token"] = time.perf_counter() - start
    start = time.perf_counter()
    outputs = generate(request["questions"], request["max_tokens"])
    seconds["answers"] = time.perf_counter() - start
    reports = [report for report in llm.collective_rpc("thaw_report") if report is not None]
    return {
        "reports": reports,
        "compiled": llm.collective_rpc("thaw_compiled"),
        "outputs": [
            {
                "text": output.outputs[0].text,
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    sorted((token, entry.logprob) for token, entry in step.items())
                    for step in output.outputs[0].logprobs or []
                ],
            }
            for output in outputs
        ],
    }


def _kv(request: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """One question, with nothing cached and from the cache before freezing it, or once it was restored."""
    import dataclasses

    from vllm import LLM, SamplingParams

    from .kv.api import expect_kv_restore, freeze_kv_cache, restore_kv_cache

    start = time.perf_counter()
    llm = LLM(model=request["model"], **request["engine_args"])
    seconds["engine"] = time.perf_counter() - start
    (question,), kv = request["questions"], request["kv"]
    if not kv["freeze"]:
        expect_kv_restore(llm)

    def asked(max_tokens: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1)
        if isinstance(question, str):
            return llm.chat([{"role": "user", "content": question}], sampling, use_tqdm=False)[0]
        return llm.generate([{"prompt_token_ids": question}], sampling, use_tqdm=False)[0]

    def first_token(name: str) -> int:
        start = time.perf_counter()
        found = asked(1)
        seconds[name] = time.perf_counter() - start
        return int(found.num_cached_tokens or 0)

    warm = SamplingParams(temperature=0, max_tokens=2, logprobs=1)  # as what is asked: log-probabilities take kernels
    llm.generate([{"prompt_token_ids": [*range(5, 105)]}], warm, use_tqdm=False)
    cached = {}
    if not kv["freeze"]:
        report: Any = restore_kv_cache(llm, kv["path"], model_id=kv["model_id"])
        cached["thawed"] = first_token("thawed")
    else:
        cached |= {name: first_token(name) for name in ("cold", "cached")}
    output = asked(request["max_tokens"])
    if kv["freeze"]:
        report = freeze_kv_cache(llm, kv["path"], model_id=kv["model_id"], force=True)
    return {
        "reports": [],
        "report": dataclasses.asdict(report),
        "cached": cached,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {
                "text": output.outputs[0].text,
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [sorted((t, e.logprob) for t, e in at.items()) for at in output.outputs[0].logprobs or []],
            }
        ],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
