"""``thaw freeze``: a checkpoint through vLLM's own loader into a snapshot, one file a rank."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Force, Json, document, pairs, plain, size, stdout_to_stderr

EXAMPLES = """
thaw freeze --model Llama-3-8B/ --output llama.thaw
thaw freeze --model Llama-3-70B/ --output llama.thaw --tensor-parallel-size 4
thaw freeze --model Llama-3-8B/ --output llama.thaw --compress
thaw freeze --model Llama-3-8B/ --output llama.thaw --with-caches
thaw freeze --model M --output m.thaw --engine-arg 'hf_overrides={"rope_theta": 1000000}'
"""

_SERVED = (
    *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"),
    *("dtype", "quantization", "max_model_len", "trust_remote_code"),
)
"""Of this command's options those that a server is given as well."""
_WORD = re.compile(r"[A-Za-z0-9_./:@-]+")


def freeze(
    model: Annotated[str, typer.Option(help="Model directory, or a name on the hub that is in the local cache.")],
    output: Annotated[Path, typer.Option(help="The snapshot; the manifest's name when there are several ranks.")],
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="As for vllm serve; others thaw it more slowly.")
    ] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="As for vllm serve; it is fixed by freezing.")] = 1,
    enable_expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="As for vllm serve; it is fixed, too.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="As for vllm serve.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As for vllm serve.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="As for vllm serve.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python files of the model directory.")
    ] = False,
    source_format: Annotated[str, typer.Option(help="vLLM's load format for the checkpoint.")] = "auto",
    engine_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other engine argument, its value in JSON.")
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Store what shrinks losslessly compressed: bfloat16 by a third.")
    ] = False,
    with_caches: Annotated[
        bool,
        typer.Option(
            "--with-caches",
            help="Afterwards start vLLM from it, and keep what it compiles beside it (thaw caches pack).",
        ),
    ] = False,
    force: Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show vLLM's own log.")] = False,
    as_json: Json = False,
) -> None:
    """Freeze a model for vLLM into a snapshot.

    Its checkpoint is loaded once, by vLLM's own loader, and what the engine then holds is written. No KV cache is
    made and nothing is compiled. Serve it with --load-format thaw and --model-loader-extra-config '{"snapshot":
    "weights.thaw"}', or in Python with thaw_vllm.load().
    """
    given: dict[str, Any] = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "enable_expert_parallel": enable_expert_parallel or None,
        "dtype": dtype,
        "quantization": quantization,
        "max_model_len": max_model_len,
        "trust_remote_code": trust_remote_code or None,
        "force": force,
        "compress": compress,
        "source_format": source_format,
        "use_tqdm_on_load": sys.stderr.isatty(),
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    engine_args = dict(parse_engine_arg(text) for text in engine_arg or [])
    for name in ("model", "path"):
        if name in engine_args:
            raise typer.BadParameter(f"--engine-arg cannot set {name}; --model and --output do")
    arguments |= engine_args
    if with_caches:
        _with_caches(model, output, given, engine_arg or [], verbose, as_json)
        return
    if not verbose:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # our own errors are said once, by us
    with stdout_to_stderr():
        from ..engines.vllm.api import freeze_checkpoint

        reports = freeze_checkpoint(model, output, **arguments)
    if as_json:
        ranks = [dataclasses.asdict(r) | {"gb_per_s": round(r.gb_per_s, 3)} for r in reports]
        document({"path": str(output), "model": reports[0].model, "content": reports[0].content, "ranks": ranks})
        return
    _show([dataclasses.asdict(r) | {"gb_per_s": r.gb_per_s} for r in reports])


def _show(reports: list[dict[str, Any]], *more: tuple[str, str]) -> None:
    rows = [
        ("wrote", f"{plain(r['path'])} ({size(r['file_size'])}, {r['tensors']} tensors, {r['gb_per_s']:.2f} GB/s)")
        for r in reports
    ]
    rows.append(("model", reports[0]["model"] or "unknown: the checkpoint is not on this machine"))
    rows.append(("content", reports[0]["content"]))
    pairs([*rows, *more])


def _with_caches(
    model: str, output: Path, given: dict[str, Any], engine_arg: list[str], verbose: bool, as_json: bool
) -> None:
    """Freeze in a process that gives back the GPU's memory when it ends; then pack what a server compiles.

    Args:
        given: options by the names of engine arguments.
        engine_arg: as on the command line.
    """
    from ..engines.vllm.caches import beside
    from ..engines.vllm.command_line import options
    from ..engines.vllm.packing import check_arguments, pack
    from ..errors import ThawError
    from ..transport.writer import check_target

    check_target(beside(output), given["force"])
    check_arguments(dict(map(parse_engine_arg, engine_arg)))
    chosen = {name: value for name, value in given.items() if value is not None and name != "use_tqdm_on_load"}
    words = options({name: value for name, value in chosen.items() if value is not False})
    words += [word for text in engine_arg for word in ("--engine-arg", text)] + ["--verbose"] * verbose
    command = [sys.executable, "-m", "thaw_vllm", "freeze", "--model", model, "--output", str(output), *words, "--json"]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if ran.returncode:
        raise typer.Exit(ran.returncode)
    frozen = json.loads(ran.stdout)
    served = {name: chosen[name] for name in _SERVED if name in chosen} | dict(map(parse_engine_arg, engine_arg))
    served = {name: value for name, value in served.items() if value is not None}
    say = partial(print, "thaw:", file=sys.stderr, flush=True)
    try:
        with stdout_to_stderr():
            packed = pack(beside(output), model, output, options(served), force=given["force"], say=say)
    except ThawError as error:
        raise type(error)(f"{str(output)!r} was frozen, but its caches were not packed: {error}") from None
    if as_json:
        document(frozen | {"caches": {"path": packed.path, "sha256": packed.sha256, "bytes": packed.size}})
        return
    told = f"{plain(packed.path)} ({size(packed.size)}, {packed.compiled} compiled parts)"
    _show(frozen["ranks"], ("caches", told), ("their sha256", packed.sha256))


def parse_engine_arg(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--engine-arg``: the key with underscores, the value read as JSON or, if a plain word, as text.

    Raises:
        typer.BadParameter: neither.
    """
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"--engine-arg takes KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        if _WORD.fullmatch(value) and value not in ("True", "False", "None"):
            return key, value
    raise typer.BadParameter(f'--engine-arg {key}: {value!r} is not JSON; write true, 1.5, "text" or {{"a": 1}}')
