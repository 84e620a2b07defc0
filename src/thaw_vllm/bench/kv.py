"""``thaw bench kv``: the first token of a prompt cold, prefix-cached and thawed, and the freeze and the restore."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import StorageError, ThawError, UsageError, named
from ..weights.checkpoint import open_checkpoint
from ..weights.provenance import checkpoint_id
from . import ceilings
from .kv_task import ANSWER
from .outcome import Missed, Outcome, Say
from .process import DONE, PREPARED, READY, RESULT, STARTING, Child, ChildError
from .record import Record, file_system_of
from .summary import COMPRESSED

FREEZE, RESTORE = "kv-freeze", "kv-restore"
COLD, PREFIX, THAWED = "ttft-cold", "ttft-prefix", "ttft-thawed"
LENGTHS = (1024, 2048, 4096, 8192)
"""Prompts that are measured unless others are asked for, as far as the model has room for them."""
SPARE = 64
"""Tokens beyond the longest prompt that the engine is started for."""
ENGINE, MEASURING = 1800.0, 3600.0
"""Seconds that starting an engine (weights, compiling, warm-up) and measuring all lengths may take."""
WHO = {"kv-freeze": "the engine that freezes", "kv-thaw": "the engine that thaws"}
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a model directory.
        tokens: of the prompts; empty for LENGTHS.
        directory: where the files go; removed afterwards.
        runs: of each length in an engine.
        eager: without compiling and CUDA graphs; None for that where there is no GPU.
        engine_args: further ones of vLLM.
        limits: how limits are measured; with the device ``cpu`` none are.
    """

    model: Path
    tokens: tuple[int, ...]
    directory: Path
    runs: int
    eager: bool | None
    engine_args: dict[str, Any]
    limits: ceilings.Settings


@dataclass(frozen=True)
class Plan:
    """What the model's config makes of the settings.

    Attributes:
        tokens: of the prompts that are measured.
        engine_args: all of them.
        vocabulary: token ids there are.
    """

    tokens: tuple[int, ...]
    engine_args: dict[str, Any]
    vocabulary: int

    @property
    def route(self) -> str:
        """``eager`` or ``graphs``."""
        return "eager" if self.engine_args["enforce_eager"] else "graphs"


def measure(settings: Settings, say: Say) -> Outcome:
    """The limits, an engine that freezes, and a fresh one that thaws.

    Raises:
        StorageError: there is no such model, or no room.
        UsageError: a prompt that is too long, or too short to be cached.
        ThawError: the first engine failed; where the second one does, that is a line.
    """
    planned = plan(settings, say)
    outcome = _limits(settings, say)
    with requested(settings, planned, say) as request:
        frozen = run("kv-freeze", request, say)
        try:
            thawed = run("kv-thaw", request, say)
        except ThawError as error:
            thawed = None
            outcome.missed += [Missed(work, "thaw", "", str(error)) for work in (RESTORE, RESTORE + COMPRESSED, THAWED)]
    count = planned.engine_args.get("tensor_parallel_size", 1)
    ranks = {"ranks": count} if count > 1 else {}
    for number, tokens in enumerate(planned.tokens):
        second = None if thawed is None else thawed["lengths"][number]
        found = _records(tokens, frozen["lengths"][number], second, planned.route, settings.directory)
        outcome.records += [replace(record, extra=record.extra | ranks) for record in found]
    return outcome


def plan(settings: Settings, say: Say, usual: Sequence[int] = LENGTHS) -> Plan:
    """What is asked of the engines.

    Args:
        usual: tokens of prompts where the settings name none; those that are too long are left out.

    Raises:
        StorageError: there is no such model.
        UsageError: a prompt that leaves no room for its answer.
    """
    config = config_of(settings.model)
    given, longest = settings.engine_args, _room(config, settings.engine_args)
    lengths = tuple(dict.fromkeys(settings.tokens or usual))
    cure = (
        "give --engine-arg max_model_len=N, or leave that out"
        if "max_model_len" in given
        else "give fewer --tokens, or --engine-arg hf_overrides={...} where the model bears longer prompts"
    )
    if longest is not None:
        bad = [tokens for tokens in lengths if tokens + ANSWER > longest]
        if bad:
            what = f"{bad[0]} tokens and an answer of {ANSWER} are more than the {longest} that the model may have"
            if settings.tokens or len(bad) == len(lengths):
                raise UsageError(f"{what}; {cure}")
            say(f"left out: {what}; {cure}")
            lengths = lengths[: -len(bad)]
    needed = max(lengths) + SPARE
    eager = settings.limits.device == "cpu" if settings.eager is None else settings.eager
    args: dict[str, Any] = {
        "enforce_eager": eager,
        "enable_prefix_caching": True,
        "max_model_len": needed if longest is None else min(needed, longest),
    }
    if not any((settings.model / name).exists() for name in TOKENIZERS):
        args["skip_tokenizer_init"] = True
    return Plan(lengths, args | given, int(config["vocab_size"]))


@contextlib.contextmanager
def requested(settings: Settings, planned: Plan, say: Say) -> Iterator[dict[str, Any]]:
    """What both engines are asked with, and a folder for their files, which is removed when the context is left.

    Raises:
        StorageError: the model cannot be read, or there is no room.
    """
    say("the model id, which the cache belongs to")
    model_id = checkpoint_id(open_checkpoint(settings.model))
    with (
        tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=settings.directory) as folder,
        tempfile.TemporaryDirectory(prefix="thaw-") as sockets,
    ):
        yield {
            "model": str(settings.model),
            "model_id": model_id,
            "engine_args": planned.engine_args,
            "tokens": planned.tokens,
            "vocabulary": planned.vocabulary,
            "runs": settings.runs,
            "folder": folder,
            "sockets": sockets,
        }


def run(task: str, request: dict[str, Any], say: Say) -> dict[str, Any]:
    """One of this benchmark's engines; see ``ask_engine``."""
    return ask_engine(task, request, WHO[task], f"measuring {', '.join(map(str, request['tokens']))} tokens", say)


def ask_engine(task: str, request: dict[str, Any], who: str, doing: str, say: Say) -> dict[str, Any]:
    """A fresh process with an engine; its answer.

    Args:
        who, doing: what people are told of it.

    Raises:
        ThawError: it failed; of the class of its error where that is one of thaw's.
    """
    with Child(task, request) as child:
        try:
            child.reach(READY, STARTING)
            say(f"{who}: starting")
            child.go()
            child.reach(PREPARED, ENGINE)
            say(f"{who}: warm; {doing}")
            child.go()
            child.reach(DONE, MEASURING)
            child.go()
            answer: dict[str, Any] = child.reach(RESULT)["result"]
        except ChildError as error:
            raise failure(who, str(error), child.printed()) from None
    return answer


def failure(who: str, said: str, printed: str) -> ThawError:
    """What to raise of a child that failed: its error, of its class where that is one of thaw's.

    An engine core's error is in the log alone; the process that started it says to look there.
    """
    if re.search("root cause|stack trace", said):
        found = re.findall(r"\b(\w*(?:Error|Exception): .+)", printed)
        told = [line for line in found if not re.search("root cause|stack trace", line)]
        said = told[-1].strip()[:400] if told else said
    spelt = re.match(r"(?:thaw_vllm\.errors\.)?(\w+): (.*)", said)
    kind = named(spelt[1]) if spelt else None
    return kind(f"{who}: {spelt[2]}") if spelt and kind else ChildError(f"{who}: {said}")


def _limits(settings: Settings, say: Say) -> Outcome:
    outcome = Outcome()
    if settings.limits.device == "cpu":
        return outcome
    for work in ceilings.LINK:
        outcome += ceilings.link(work, settings.limits, say)
    write = "tmpfs-write" if ceilings.on_memory(settings.directory) else "disk-write"
    outcome += ceilings.measure([write], [settings.directory], settings.limits, say)
    return outcome


def _records(
    tokens: int, frozen: dict[str, Any], thawed: dict[str, Any] | None, route: str, directory: Path
) -> Iterator[Record]:
    place, extra = file_system_of(directory), {"tokens": tokens}
    freezes = frozen["reports"]
    told = extra | {"directory": str(directory), "blocks": freezes[-1]["blocks"], "phases": phases(freezes)}
    different = None if thawed is None else thawed["different"]
    equal = None if thawed is None else different is None
    more = {"different": different} if different else {}
    how, size, seconds = freezes[-1].get("route") or "background", freezes[-1]["bytes"], frozen["freeze"]
    yield Record(FREEZE, "thaw", how, size, seconds, "warm", False, equal, None, told | more, place)
    cached = extra | {"cached": frozen["cached"]}
    yield Record(COLD, "vllm", route, 0, frozen["cold"], "warm", False, None, None, extra)
    yield Record(PREFIX, "vllm", route, 0, frozen["prefix"], "warm", False, None, None, cached)
    if thawed is None:
        return
    restores = thawed["reports"]
    told |= {"blocks": restores[-1]["blocks"], "phases": phases(restores), "first_s": round(thawed["restore"][0], 6)}
    how, size, seconds = restores[-1].get("route") or "restore", restores[-1]["bytes"], thawed["restore"]
    yield Record(RESTORE, "thaw", how, size, seconds, "warm", True, equal, None, told | more, place)
    small = thawed["small_reports"]
    told = extra | {
        "directory": str(directory),
        "phases": phases(small),
        "stored": thawed["small_file"],
        "wire_gb_per_s": round(thawed["small_file"] / 1e9 / statistics.median(thawed["small_restore"]), 3),
    }
    different = thawed["small_different"]
    more = {"different": different} if different else {}
    seconds = thawed["small_restore"]
    yield Record(
        *(RESTORE + COMPRESSED, "thaw", how, size, seconds, "warm", True, different is None, None, told | more, place)
    )
    both = [restore + first for restore, first in zip(thawed["restore"], thawed["thawed"], strict=True)]
    cold, warm = frozen["cold_answer"], frozen["answer"]
    told = extra | {
        "cached": thawed["cached"],
        "with_restore": [round(s, 6) for s in both],
        "cold_tokens_equal": cold["tokens"] == thawed["answer"]["tokens"],
        "cold_logprob_difference": _apart(cold, thawed["answer"]),
        "engines_equal": _same(cold, thawed["cold_answer"]) and _same(warm, thawed["hit_answer"]),
        "own_hit_equal": _same(thawed["answer"], thawed["hit_answer"]),
    }
    wrong = _wrong(thawed, warm, cold, frozen["cached"])
    more = {"different": wrong} if wrong else {}
    yield Record(THAWED, "thaw", route, 0, thawed["thawed"], "warm", False, not wrong, None, told | more)


def _wrong(thawed: dict[str, Any], reference: dict[str, Any], cold: dict[str, Any], cached: int) -> str:
    """How an answer differs from that of the engine that froze; empty where it does not."""
    if thawed["cached"] != cached:
        return f"{thawed['cached']} of {cached} tokens were cached"
    answer = thawed["answer"]
    wrong = next((what for what in _COMPARED if answer[what] != reference[what]), "")
    if wrong and _same(answer, thawed["hit_answer"]):
        return f"{wrong}; without any thawing the two engines answer differently in the same way"
    if wrong and not _same(cold, thawed["cold_answer"]):
        return f"{wrong}; without any cache the two engines answer differently, as where one of them compiled anew"
    return wrong


_COMPARED = ("tokens", "logprobs")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[what] == other[what] for what in _COMPARED)


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of log-probabilities as long as the tokens are the same."""
    largest = 0.0
    for token, same, left, right in zip(
        one["tokens"], other["tokens"], one["logprobs"], other["logprobs"], strict=True
    ):
        if token != same:
            break
        largest = max(largest, abs(left - right))
    return largest


def phases(reports: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of every run by phase, and of all of it as the engine counts (``engine``)."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for name, seconds in (report["phases"] | {"engine": report["seconds"]}).items():
            found.setdefault(name, []).append(round(seconds, 6))
    return found


def config_of(model: Path) -> dict[str, Any]:
    """Of the text model where there are several.

    Raises:
        StorageError: there is no such model.
        UsageError: its config does not say what token ids there are.
    """
    if not model.is_dir():
        raise StorageError(f"there is no model directory {str(model)!r}")
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = config.get("text_config") or config
        if isinstance(found["vocab_size"], int):
            return found
    except OSError as error:
        raise StorageError(f"{str(model / 'config.json')!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(f"{str(model / 'config.json')!r} has no vocab_size, so which token ids there are is not known")


def _room(config: dict[str, Any], engine_args: dict[str, Any]) -> int | None:
    """Tokens that a prompt and its answer may have; None where vLLM alone can tell."""
    given = engine_args.get("max_model_len")
    if given is None and "hf_overrides" not in engine_args:
        given = config.get("max_position_embeddings")
    return given if isinstance(given, int) and given > 0 else None
