"""``thaw serve``: vLLM's own server, in a fork of the zygote where there is one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..engines.vllm.versions import SERVER as MODULE
from .zygote import CacheDir

EXAMPLES = """
thaw serve --model Llama-3-8B/ --snapshot W.thaw
thaw serve --model Llama-3-8B/ --snapshot W.thaw --port 8001 --max-model-len 8192
thaw serve --model Llama-3-8B/ --require-zygote
thaw serve --model Llama-3-8B/ --snapshot W.thaw --fast-start --cache-dir /var/cache/thaw
"""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["--help"]}


class Command(TyperCommand):
    """Takes -h for itself only where it stands alone: vLLM has options such as -cc.cudagraph_mode."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left."""
        parsed: list[str] = super().parse_args(ctx, ["--help" if word == "-h" else word for word in args])
        return parsed


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="A model directory, or its name on the hub.")],
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", metavar="FILE", help="Thaw the weights from this file."),
    ] = None,
    zygote: Annotated[str, typer.Option("--zygote", metavar="NAME", help="Which one to fork.")] = "default",
    require_zygote: Annotated[
        bool, typer.Option("--require-zygote", help="Fail where no zygote can run the server; else it is started anew.")
    ] = False,
    fast_start: Annotated[
        bool,
        typer.Option(
            "--fast-start",
            help="Few CUDA graphs, compiled code as one file, memory as measured before; says what that costs.",
        ),
    ] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Run vLLM's own server, in a fork of the zygote.

    It is OpenAI-compatible; any other option is vllm serve's. With a zygote (thaw zygote start) it is up in seconds.
    Without one, a new Python is started for it, and a line says so.
    """
    from ..engines.vllm.api import check_model, check_sizes, require_vllm_installed
    from ..engines.vllm.command_line import given
    from ..engines.vllm.command_line import options as command_line
    from ..engines.vllm.fast_start import cache_variables
    from ..engines.vllm.fast_start import fast_start as choose
    from ..errors import UsageError
    from .run import hand_over

    require_vllm_installed()
    check_model(model)
    options = list(context.args)
    if snapshot is not None:
        chosen = given(options)
        for taken in ("load_format", "model_loader_extra_config"):
            if taken in chosen:
                option = "--" + taken.replace("_", "-")
                raise UsageError(f"--snapshot sets {option} itself; leave {option} out")
        check_sizes(str(snapshot.absolute()), _sizes(chosen))
        extra = json.dumps({"snapshot": str(snapshot.absolute())})
        options = ["--load-format", "thaw", "--model-loader-extra-config", extra, *options]
    os.environ.update(cache_variables(cache_dir))
    if fast_start:
        preset = choose(given(options), os.environ)
        os.environ.update(preset.environment)
        options = [*command_line(preset.engine_args), *options]
        for line in preset.said:
            print(f"thaw: fast start: {line}", file=sys.stderr, flush=True)
    hand_over([MODULE, "--model", model, *options], "module", zygote, fallback=not require_zygote)


def _sizes(chosen: Mapping[str, str]) -> dict[str, int]:
    """The parallel sizes among vLLM's options, as ``check_sizes`` has them."""
    names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}
    sizes = {names.get(name, name): value for name, value in chosen.items()}
    return {name: int(sizes[name]) for name in names.values() if sizes.get(name, "").isdigit()}
