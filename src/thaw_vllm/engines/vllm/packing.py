"""What a start of vLLM compiles, packed into a file that can lie beside a snapshot."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...caches import archive, machine, packing, places, trust
from ...errors import ThawError, UsageError
from ...transport.writer import check_target
from . import fresh, one_server
from .command_line import given, options
from .fast_start import BUNDLE, PLAN, among, can_bundle, fast_start
from .versions import NOTE, PLANNED

_OWN = {"load_format", "model_loader_extra_config", "host", "port", "uds"}
_OF_CLIENTS = {"api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "root_path", "headless"}
"""Options that say how a server is reached; packing reaches its own in a way of its own."""
_TOLD = {
    *("dtype", "quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"),
    *("kv_cache_memory_bytes", "kv_cache_dtype", "block_size", "tensor_parallel_size", "pipeline_parallel_size"),
    *("data_parallel_size", "enable_expert_parallel", "enforce_eager", "trust_remote_code", "enable_prefix_caching"),
    *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "optimization_level", "O", "attention_backend"),
}
"""Arguments whose values a file of caches tells; of others, which may be secrets, that they were given."""
_PLAIN = re.compile(r"[\w.:-]{0,40}")
_COMPILED = re.compile(r"vllm/torch_compile_cache/torch_aot_compile/[^/]+/rank_\d+_\d+/model")
_BESIDE = re.compile(r"(vllm/torch_compile_cache/torch_aot_compile/[^/]+/inductor_cache/triton/\d+/)(.+)")
_PROMPTS = (1, 2, 5, 16, 33, 64, 100, 200, 500)
"""Lengths of what a server is asked so that it compiles what it compiles late."""
_ANSWER = 16
_PATIENCE = 3600.0
"""Seconds for a server to come up with everything compiled, of a large model."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        path: the file of caches.
        sha256: of it.
        size: in bytes.
        manifest: what it says of itself.
        seconds: until the server was healthy, or the engine had given its first token, all being compiled.
        answer: of ``fresh.run``, offline.
    """

    path: str
    sha256: str
    size: int
    manifest: archive.Manifest
    seconds: float
    answer: dict[str, Any] | None = None

    @property
    def compiled(self) -> int:
        """Parts of the model, of every rank, whose code is in it; 0 of an engine that compiles none."""
        return sum(_COMPILED.match(member.path) is not None for member in self.manifest.members)


def pack(
    path: str | os.PathLike[str],
    model: str,
    snapshot: str | os.PathLike[str] | None = None,
    words: Sequence[str] = (),
    *,
    quick: bool = False,
    offline: Mapping[str, Any] | None = None,
    questions: Sequence[list[int]] | None = None,
    max_tokens: int = _ANSWER,
    force: bool = False,
    log: Path | None = None,
    say: Say = lambda line: None,
) -> Packed:
    """Start vLLM with empty caches, have it compile all that it needs, and pack that.

    Args:
        path: the file of caches to write.
        model: a model directory, or a name on the hub.
        snapshot: to thaw its weights from; None reads the checkpoint.
        words: options of vLLM's server, those that it will be served with.
        quick: also with the preset of ``thaw serve --fast-start``.
        offline: engine arguments of ``vllm.LLM``, which is started in place of a server: they compile differently.
        questions: token ids that it is asked, offline; None for prompts of many lengths.
        max_tokens: of each answer.
        force: replace an existing file.
        log: where what vLLM prints stays; None to keep nothing.

    Raises:
        UsageError: options that this sets itself; nothing was compiled.
        ThawError: vLLM did not come up.
        ExistsError, SpaceError, StorageError: the file cannot be written.
    """
    path = Path(os.path.abspath(path))
    chosen: Mapping[str, Any] = given(words) if offline is None else offline
    check_arguments(chosen)
    check_target(path, force)
    snapshot = None if snapshot is None else os.path.abspath(snapshot)
    args: dict[str, Any] = {}
    bundled = os.environ.get(BUNDLE, "1" if can_bundle(os.environ) else "0")
    variables: dict[str, str | None] = {BUNDLE: bundled, PLAN: os.environ.get(PLAN, "1")}
    if bundled != "1":
        say(f"vLLM keeps compiled code in pieces here, which do not travel; kernels do ({BUNDLE}=1 would change that)")
    if quick:
        preset = fast_start(chosen, os.environ)
        args = preset.engine_args
        variables |= preset.environment
        for line in preset.said:
            say(f"fast start: {line}")
    with tempfile.TemporaryDirectory(prefix="thaw-caches-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        variables |= places.empty(root)
        variables |= dict.fromkeys(places.UNSET)
        log = root / "log.txt" if log is None else log
        say("starting vLLM with empty caches, so that it compiles all that it needs")
        answer = None
        if offline is None:
            loader = {} if snapshot is None else {"model_loader_extra_config": {"snapshot": snapshot}}
            served = [*options({"load_format": "thaw"} | loader | args), *words]
            seconds = _serve(model, served, variables, log, max_tokens, say)
        else:
            args = args | dict(offline) | ({"load_format": "thaw"} if snapshot is None else {})
            answer = _start(model, snapshot, args, variables, log, questions, max_tokens)
            seconds = sum(answer["seconds"][name] for name in ("process", "imports", "engine", "first_token"))
        say(f"it was ready after {seconds:.0f} s; packing")
        made = {
            "thaw": __version__,
            "model": os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model,
            "usage": "server" if offline is None else "offline",
            "arguments": _shown(chosen),
            "fast_start": quick,
            "variables": {name: variables[name] for name in (BUNDLE, PLAN)},
        }
        environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
        written = packing.pack(path, _found(environment), machine.key(), made, force=force)
    trust.note_own(written.sha256, os.environ)
    done = Packed(str(path), written.sha256, written.size, written.manifest, seconds, answer)
    if not done.compiled and bundled == "1":
        say("vLLM kept no compiled code of the model; only kernels, and what it has noted, were packed")
    return done


def check_arguments(chosen: Mapping[str, Any]) -> None:
    """Refuse arguments that packing sets itself, before anything is started.

    Raises:
        UsageError: with the cure.
    """
    if taken := sorted(name for name in chosen if among({name}, _OWN | _OF_CLIENTS)):
        raise UsageError(
            f"packing sets --{taken[0].replace('_', '-')} itself; leave it out: it changes nothing of what is compiled"
        )


def pack_caches(
    path: str | os.PathLike[str],
    model: str,
    snapshot: str | os.PathLike[str] | None = None,
    *,
    fast_start: bool = False,
    force: bool = False,
    **llm_kwargs: Any,
) -> str:
    """Pack what ``load`` with the same arguments compiles, for its ``caches``; another process starts an engine for it.

    Args:
        path: the file to write (``.thawcaches``).
        model: model directory or hub name.
        snapshot: to thaw its weights from; None reads the checkpoint.
        fast_start: as of ``load``.
        force: replace an existing file.
        llm_kwargs: of ``vllm.LLM``, as they will be given; values that JSON has.

    Returns:
        The file's SHA-256, for ``trust_caches`` on other machines; here it is ``own``.

    Raises:
        UsageError, ExistsError, SpaceError, StorageError, ThawError: as ``thaw caches pack``.
    """
    return pack(path, model, snapshot, quick=fast_start, offline=llm_kwargs, force=force).sha256


def _serve(
    model: str, words: list[str], variables: Mapping[str, str | None], log: Path, max_tokens: int, say: Say
) -> float:
    """Run a server until it has answered as it will be asked; seconds until it was healthy."""
    environment = {**fresh.READ_FROM_THE_LOG, **variables, "VLLM_API_KEY": None}
    with one_server.serving(model, words, environment, None, log, patience=_PATIENCE) as server:
        say("it is healthy; asking, for what it compiles late")
        name, longest = server.described()
        asked = replace(server, model=name)
        lengths = [length for length in _PROMPTS if length + max_tokens < longest]
        try:
            for length in lengths:
                asked.complete(_prompt(length), max_tokens)
            with ThreadPoolExecutor(len(lengths) or 1) as pool:
                for sampling in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {"temperature": 1.0, "top_k": 20}):
                    sent = [pool.submit(asked.complete, _prompt(length), max_tokens, **sampling) for length in lengths]
                    for one in sent:
                        one.result()
        except ThawError as error:  # a model of another task
            say(f"it gives no completions, so what it compiles for requests is not packed: {error}")
        return server.seconds


def _start(
    model: str,
    snapshot: str | None,
    args: dict[str, Any],
    variables: Mapping[str, str | None],
    log: Path,
    questions: Sequence[list[int]] | None,
    max_tokens: int,
) -> dict[str, Any]:
    """The same of ``vllm.LLM``; what it answered."""
    longest = int(args.get("max_model_len") or 4096)
    return fresh.run(
        "ask",
        model=model,
        snapshot=snapshot,
        engine_args=args,
        questions=list(questions or (_prompt(length) for length in _PROMPTS if length + max_tokens < longest)),
        max_tokens=max_tokens,
        environment={name: value for name, value in variables.items() if value is not None},
        removed=[name for name, value in variables.items() if value is None],
        log=log,
    )


def _prompt(length: int) -> list[int]:
    return [5 + at % 100 for at in range(length)]


def _shown(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Arguments, for whoever wants to start the same, with the values of those that cannot be secrets."""
    return {name: str(v) if name in _TOLD and _PLAIN.fullmatch(str(v)) else "(given)" for name, v in chosen.items()}


def _found(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """What of these places is carried; of measured memory that which a start of the same configuration finds."""
    there = places.places(environment)
    found = dict(item for place in there.values() for item in places.files(place))
    yield from found.items()
    yield from ((name, source) for name, source in _kernels_elsewhere(found) if name not in found)
    plans = there[places.VLLM].directory / "startup_plan"
    for note in sorted(plans.glob(f"thaw-*{NOTE}")):
        own = plans / PLANNED.format(note.read_text(encoding="utf-8").strip())
        if own.is_file():
            yield f"{places.VLLM}/startup_plan/{PLANNED.format(note.name.removesuffix(NOTE))}", own


def _kernels_elsewhere(found: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Triton's kernels where else they are looked for.

    While a model is compiled, and after that, they are kept beside what is compiled (``CachingAutotuner`` of PyTorch
    sets TRITON_CACHE_DIR); a start that finds the model compiled looks where Triton itself keeps them.
    """
    beside = {match[1] for name in found if (match := _BESIDE.match(name))}
    for name, source in found.items():
        if match := _BESIDE.match(name):
            yield f"{places.TRITON}/{match[2]}", source
        elif name.startswith(f"{places.TRITON}/"):
            yield from ((prefix + name.partition("/")[2], source) for prefix in sorted(beside))
