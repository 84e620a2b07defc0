"""Answers cut at some tokens and resumed, by three proofs: blocks, the same engine, another process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engines.vllm.test_kv import ID, engine, same

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store

NEAR = 0.4
"""Between the two best log-probabilities, where rounding may choose the other token; each was seen to move by 0.2."""

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11, "top_p": 0.95},
    "presence": {"temperature": 0.0, "presence_penalty": 0.8},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.7},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.3},
    "seeded with penalties": {"temperature": 0.9, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "stop": {"temperature": 1.0, "seed": 3, "allowed_token_ids": [*range(300, 500)]},
}
"""Sampling parameters; ``stop`` gets a string for each cut, half of which is before it, of tokens that have a text."""


def prompts(rng: random.Random, length: int, vocabulary: int, count: int = 8) -> list[list[int]]:
    """The first one is asked, the others where its answer has no such stop string."""
    return [[rng.randrange(5, vocabulary) for _ in range(length)] for _ in range(count)]


def cuts(
    folder: Path,
    asked: list[list[int]],
    kinds: Mapping[str, dict[str, Any]],
    at: Mapping[str, list[int]],
    length: int,
    invariant: bool = False,
    **args: Any,
) -> dict[str, Any]:
    """What was wrong, by the three proofs, and how far resumed runs were from those that were not interrupted.

    Args:
        folder: an empty one.
        asked: prompts; see ``prompts``.
        kinds: sampling parameters by name, as ``KINDS``.
        at: for each of them after how many tokens its answer is cut.
        length: tokens of an answer.
        invariant: batch-invariant kernels; every bit is held against the uninterrupted run then.
        args: of the engine.
    """
    more = {"max_tokens": length, "logprobs": 2, "ignore_eos": True}
    about = {"store": str(folder / "store"), "model_id": ID} | ({} if "snapshot" not in args else {"model_id": None})
    steps: list[dict[str, Any]] = [
        {"do": "cuts", "prompts": asked, "kinds": {kind: kinds[kind] | more for kind in at}, "at": dict(at), **about},
        {"do": "freeze", "path": folder / "before.thawkv", "model_id": about["model_id"]},
    ]
    environment = {"VLLM_BATCH_INVARIANT": "1"} if invariant else {}
    found, _ = engine(folder, steps, environment, **args)
    assert isinstance(found, list), found
    steps = [{"do": "resume", "session": one["session"], "exact": True, **about} for one in found]
    after = {"do": "freeze", "path": folder / "after.thawkv", "model_id": about["model_id"]}
    only = {"do": "resume", "session": found[-1]["session"], "only": True, **about}
    *again, _, _, _ = engine(folder, [*steps, {"do": "reset"}, only, after], environment, **args)
    wrong, furthest, equal = [], 0.0, 0
    for one, anew in zip(found, again, strict=True):
        name, rest, living = one["session"], one["rest"], one["living"]
        if "error" in anew or one["inexact"] or anew["inexact"]:
            wrong.append([name, "not exact", anew])
            continue
        if not same([living], [anew["answer"]]) or living["ended"] != anew["answer"]["ended"]:
            wrong.append([name, "another process", living, anew["answer"]])
        whole = same([rest], [living]) and rest["ended"] == living["ended"]
        equal += whole
        if not whole and (invariant or apart(rest, living, 0) is not None):
            wrong.append([name, "the uninterrupted run", rest, living])
        for ours, theirs in zip(living["logprobs"], rest["logprobs"], strict=False):
            if [token for token, _ in ours] != [token for token, _ in theirs]:
                break
            furthest = max(furthest, *(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True)))
    before, after_pages = (pages_by_address(folder / f"{name}.thawkv") for name in ("before", "after"))
    if not after_pages or not after_pages.items() <= before.items():
        wrong.append(["blocks", len(after_pages), len(before)])
    if not fsck(Store(folder / "store")).sound:
        wrong.append(["fsck"])
    log = (folder / "log.txt").read_text(errors="replace")
    return {
        "cuts": len(found),
        "as_uninterrupted": equal,
        "furthest": furthest,
        "invariant": invariant,
        "restored_pages": len(after_pages),
        "v2": "V2 Model Runner" in log,
        "wrong": wrong,
    }


def apart(whole: dict[str, Any], rest: dict[str, Any], at: int) -> str | None:
    """What a resumed run's tokens differ by from those of the run that was not interrupted, but for near-ties."""
    for number, (ours, theirs) in enumerate(zip(rest["tokens"], whole["tokens"][at:], strict=True)):
        if ours != theirs:
            best, second = sorted((value for _, value in whole["logprobs"][at + number]), reverse=True)[:2]
            return None if best - second < NEAR else f"token {number}: {ours}, not {theirs} ({best} and {second})"
    return None
