"""The child's side of ``thaw bench kv``: an engine that freezes, and a fresh one that thaws, both timed."""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.vllm.fresh import endpoints
from ..errors import ThawError, UsageError
from .files import check_room
from .kv_pages import difference

if TYPE_CHECKING:
    from ..engines.vllm.prompted import Prompted
    from .child import Steps

ANSWER = 16
"""Tokens of the answers that are compared."""
SHORT = 32
"""Tokens of the short prompt of the warm-up."""
FIRST = 256
"""Ids below it are often special tokens; prompts have none of them where the vocabulary is large enough."""
SPARE = 1.05
"""Room for files over that for their pages."""


def prompt(tokens: int, vocabulary: int, seed: str = "asked") -> list[int]:
    """Random token ids, the same in every process."""
    drawn = random.Random(f"{seed} {tokens}")
    first = FIRST if vocabulary > 2 * FIRST else 0
    return [drawn.randrange(first, vocabulary) for _ in range(tokens)]


def freezing(request: dict[str, Any]) -> Steps:
    """``model``, ``model_id``, ``engine_args``, ``tokens``, ``vocabulary``, ``runs``, ``folder``, and one for
    ``sockets``.

    The answer has ``lengths``, for each of ``tokens``: seconds of every run (``cold``, ``prefix``, ``freeze``), the
    freezes' ``reports``, how many tokens were ``cached``, and the answers from the cache (``answer``) and with nothing
    cached (``cold_answer``).
    """
    import_vllm(request["sockets"])
    yield
    with started(request) as engine:
        yield
        lengths: list[dict[str, Any]] = []
        for tokens in request["tokens"]:
            lengths.append(_frozen(engine, tokens, request))
            if len(lengths) == 1:
                need_room(lengths[0]["reports"][-1]["bytes"] / tokens, request)
        yield
    return {"lengths": lengths}


def thawing(request: dict[str, Any]) -> Steps:
    """The same request, once ``freezing`` left its files in ``folder``.

    The answer has ``lengths``: seconds of every run (``restore``, ``thawed``), the restores' ``reports``, the same of
    a compressed file (``small_restore``, ``small_reports``, ``small_file``: its bytes), the fewest tokens that were
    ``cached``, the ``answer`` from the thawed cache, how the pages differ that this engine froze of it and of what came
    from the compressed file (``different``, ``small_different``), and this engine's own answers with nothing cached
    (``cold_answer``) and from its own cache (``hit_answer``).
    """
    import_vllm(request["sockets"])
    yield
    with started(request, thaws=True) as engine:
        yield
        lengths = [_thawed(engine, tokens, request) for tokens in request["tokens"]]
        yield
    return {"lengths": lengths}


TASKS = {"kv-freeze": freezing, "kv-thaw": thawing}


def import_vllm(sockets: str) -> None:
    """With what every engine of a benchmark is started with.

    Args:
        sockets: a directory for them.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without a GPU only
    os.environ.update(endpoints(sockets))
    import vllm  # noqa: F401


def started(request: dict[str, Any], *, thaws: bool = False) -> Prompted:
    """The engine, which has seen the longest prompt's length with other tokens, cold and cached, and a short prompt.

    One that ``thaws`` has been told so, as ``load(..., kv_snapshot=...)`` and a server of ``THAW_KV_DIR`` tell theirs.
    """
    from ..engines.vllm.kv.api import expect_kv_restore
    from ..engines.vllm.prompted import Prompted

    engine = Prompted(request["model"], **request["engine_args"])
    try:
        if thaws:
            expect_kv_restore(engine.llm)
        longest = max(request["tokens"])
        for tokens in (longest, longest, min(longest, SHORT)):
            engine.first_token(prompt(tokens, request["vocabulary"], "warm"))
    except BaseException:
        engine.close()
        raise
    return engine


def _frozen(engine: Prompted, tokens: int, request: dict[str, Any]) -> dict[str, Any]:
    from ..engines.vllm.kv.api import freeze_kv_cache

    ids, path = prompt(tokens, request["vocabulary"]), file_of(request, tokens)
    seconds: dict[str, list[float]] = {"cold": [], "prefix": [], "freeze": []}
    reports = []
    cached = 0
    for _ in range(request["runs"]):
        engine.forget()
        took, cached = engine.first_token(ids)
        if cached:
            raise ThawError(f"of {tokens} tokens {cached} were cached after the prefix cache had been emptied")
        seconds["cold"].append(took)
        took, cached = engine.first_token(ids)
        if not cached:
            raise UsageError(
                f"of {tokens} tokens none were cached; give more --tokens (a block may be longer), and leave prefix "
                "caching on"
            )
        seconds["prefix"].append(took)
        start = time.perf_counter()
        report = freeze_kv_cache(engine.llm, path, token_ids=ids, model_id=request["model_id"], force=True)
        seconds["freeze"].append(time.perf_counter() - start)
        reports.append(asdict(report))
    answer = engine.answer(ids, ANSWER)
    engine.forget()
    cold = engine.answer(ids, ANSWER)
    return seconds | {"reports": reports, "cached": cached, "answer": answer, "cold_answer": cold}


def _thawed(engine: Prompted, tokens: int, request: dict[str, Any]) -> dict[str, Any]:
    from ..engines.vllm.kv.api import freeze_kv_cache, restore_kv_cache
    from ..weights.compress import rewrite

    ids, path, model = prompt(tokens, request["vocabulary"]), file_of(request, tokens), request["model_id"]
    seconds: dict[str, list[float]] = {"restore": [], "thawed": []}
    reports, cached = [], []
    for _ in range(request["runs"]):
        engine.forget()
        start = time.perf_counter()
        report = restore_kv_cache(engine.llm, path, model_id=model)
        seconds["restore"].append(time.perf_counter() - start)
        reports.append(asdict(report))
        took, found = engine.first_token(ids)
        seconds["thawed"].append(took)
        cached.append(found)
    small = path.with_name("small.thawkv")
    written = [Path(report.path) for report in rewrite(path, small)]
    small_file = sum(made.stat().st_size for made in written)
    small_seconds, small_reports = [], []
    for _ in range(request["runs"]):
        engine.forget()
        start = time.perf_counter()
        report = restore_kv_cache(engine.llm, small, model_id=model)
        small_seconds.append(time.perf_counter() - start)
        small_reports.append(asdict(report))
    different = {}
    for given in (small, path):
        # Before a request computes the last block once more, whose roundings may be others.
        engine.forget()
        restore_kv_cache(engine.llm, given, model_id=model)
        again = freeze_kv_cache(engine.llm, path.with_name("again.thawkv"), token_ids=ids, model_id=model)
        different[given] = difference(path, Path(again.path))
        for file in again.files:
            Path(file).unlink(missing_ok=True)
    for made in written:
        made.unlink(missing_ok=True)
    answer = engine.answer(ids, ANSWER)
    cached.append(answer["cached"])
    engine.forget()
    cold, hit = engine.answer(ids, ANSWER), engine.answer(ids, ANSWER)
    answers = {"answer": answer, "cold_answer": cold, "hit_answer": hit}
    compressed = {"small_restore": small_seconds, "small_reports": small_reports, "small_file": small_file}
    told = {"different": different[path], "small_different": different[small]}
    return {**seconds, **answers, **compressed, **told, "reports": reports, "cached": min(cached)}


def file_of(request: dict[str, Any], tokens: int) -> Path:
    """Where the pages of the prompt of so many tokens go."""
    return Path(request["folder"]) / f"{tokens}.thawkv"


def need_room(bytes_per_token: float, request: dict[str, Any], copies: int = 1) -> None:
    """For what the other lengths take, and for two more files: one replaces another, or is a compressed copy.

    Args:
        bytes_per_token: as the first length has shown it.
        copies: in how many files each page is.

    Raises:
        SpaceError: there is less.
    """
    lengths = request["tokens"]
    needed = int(SPARE * bytes_per_token * (copies * sum(lengths[1:]) + 2 * max(lengths)))
    check_room(Path(request["folder"]).parent, needed, "give fewer or smaller --tokens, or another --dir")
