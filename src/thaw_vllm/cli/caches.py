"""``thaw caches``: what vLLM compiles, as a file that travels with a snapshot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import examples, plain_app
from .output import Force, Json, document, pairs, plain, size, stdout_to_stderr, table

EXAMPLES = """
thaw caches pack llama.thawcaches --model Llama-3-8B/ --snapshot llama.thaw
thaw caches pack llama.thawcaches --model Llama-3-8B/ --fast-start --max-model-len 8192
thaw caches unpack llama.thawcaches --trust-caches own
thaw caches unpack llama.thawcaches --trust-caches 4f1d… --cache-dir /var/cache/thaw
thaw caches info llama.thawcaches
"""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}

app = plain_app(add_completion=False)
Trust = Annotated[
    str | None,
    typer.Option(
        "--trust-caches",
        metavar="own|SHA256",
        help="Let vLLM execute what is in it: own, if you packed it here, or the SHA-256 of the whole file.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A file of caches (.thawcaches).")]


@app.callback(epilog=examples(EXAMPLES))
def caches() -> None:
    """Carry what vLLM compiles to other machines."""


@app.command(epilog=examples(EXAMPLES, "pack"), context_settings=CONTEXT)
def pack(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write (.thawcaches).")],
    model: Annotated[str, typer.Option(help="A model directory, or its name on the hub.")],
    snapshot: Annotated[
        Path | None, typer.Option("--snapshot", metavar="W.thaw", help="Thaw its weights; else the checkpoint is read.")
    ] = None,
    fast_start: Annotated[bool, typer.Option("--fast-start", help="For servers that are started with it.")] = False,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="For programs with vllm.LLM, which compiles differently; options as --engine-arg."
        ),
    ] = False,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An argument of vllm.LLM, its value in JSON; with --offline."),
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Keep what vLLM prints.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Start vLLM with empty caches, have it compile all that it needs, and pack that into a file.

    Give the options that it will be served with: any other option is vllm serve's. Other options, another vLLM,
    PyTorch, GPU or driver compile other code. Where the model lies does not matter.

    The server listens on a free port of 127.0.0.1, is asked a few completions, and is ended. It takes as long as a
    first start does, and needs the GPU.
    """
    from ..engines.vllm import packing
    from ..engines.vllm.api import check_model, check_sizes, require_vllm_installed
    from ..engines.vllm.command_line import given, parallel
    from ..errors import UsageError
    from .freeze import parse_engine_arg

    if str(path).startswith("-"):
        raise UsageError("give FILE first, as in: thaw caches pack llama.thawcaches --model M")
    words, engine_args = list(context.args), dict(parse_engine_arg(text) for text in engine_arg or [])
    if engine_args and not offline:
        raise UsageError("--engine-arg goes with --offline; give vllm serve's options as they are")
    if offline and words:
        raise UsageError(f"--offline takes no options of vllm serve ({words[0]}); give --engine-arg KEY=VALUE")
    require_vllm_installed()
    check_model(model)
    if snapshot is not None:
        check_sizes(str(snapshot), engine_args if offline else parallel(given(words)))

    def say(line: str) -> None:
        print(f"thaw: {line}", file=sys.stderr, flush=True)

    with stdout_to_stderr():
        done = packing.pack(
            path,
            model,
            snapshot,
            words,
            quick=fast_start,
            offline=engine_args if offline else None,
            force=force,
            log=log,
            say=say,
        )
    if as_json:
        document(_packed(done))
        return
    show(done)


def show(done: Any) -> None:
    """What was packed, in lines."""
    files = len(done.manifest.members)
    pairs(
        [
            ("wrote", f"{plain(done.path)} ({size(done.size)}, {files} files, {done.compiled} compiled parts)"),
            ("sha256", done.sha256),
            ("ready", f"after {done.seconds:.1f} s, nothing having been compiled before"),
        ]
    )


def _packed(done: Any) -> dict[str, Any]:
    return {
        "path": done.path,
        "sha256": done.sha256,
        "bytes": done.size,
        "files": len(done.manifest.members),
        "compiled_parts": done.compiled,
        "seconds": round(done.seconds, 3),
    }


@app.command(epilog=examples(EXAMPLES, "unpack"))
def unpack(
    path: File,
    trust_caches: Trust = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            "--cache-dir", metavar="DIR", help="As of thaw serve. [default: where vLLM and each compiler keep theirs]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put what is in a file of caches where vLLM looks for it.

    They hold machine code, and pickles that vLLM and PyTorch load: as dangerous as a wheel that is installed. Nothing
    is unpacked without --trust-caches. What is there already stays.

    Start vLLM with thaw's loader afterwards (thaw serve, or --load-format thaw), under whatever path the model lies. A
    vLLM that keeps compiled code in pieces unless told otherwise needs the variable that is printed.
    """
    from ..caches import archive, places, unpacking
    from ..engines.vllm.caches import needed, require_machine, require_trust
    from ..engines.vllm.fast_start import BUNDLE, cache_variables
    from ..errors import StorageError

    whole = archive.fetch(path)
    require_trust(whole, trust_caches, os.environ)
    caches = archive.parse(whole)
    require_machine(caches)
    environment = dict(os.environ) | cache_variables(cache_dir)
    try:
        there = places.places(environment)
    except RuntimeError as error:
        raise StorageError(f"nothing is unpacked: {error}; --cache-dir names a directory") from None
    done = unpacking.unpack(caches, there)
    chosen = os.environ.get(BUNDLE)
    variables = {} if chosen == "1" else needed(caches.manifest, {n: v for n, v in environment.items() if n != BUNDLE})
    if as_json:
        document(
            {"sha256": caches.sha256, "written": done.written, "present": done.present, "bytes": done.bytes}
            | {"unwanted": done.unwanted, "variables": variables}
        )
        return
    rows = [("unpacked", f"{done.written} files ({size(done.bytes)}), {done.present} were there")]
    if done.unwanted:
        rows.append(("left out", f"{done.unwanted} files, of places that are not known here"))
    rows += [("start vLLM with", f"{name}={value}") for name, value in variables.items()]
    pairs(rows)


@app.command(epilog=examples(EXAMPLES, "info"))
def info(path: File, as_json: Json = False) -> None:
    """Show what a file of caches holds, what it belongs to, and whether this machine is that.

    Nothing is unpacked, and nothing in it is executed.
    """
    from ..caches import archive, machine, trust
    from ..errors import StorageError

    whole = archive.fetch(path)
    caches = archive.parse(whole)
    manifest, here = caches.manifest, machine.key()
    differs = machine.differences(manifest.key, here)
    try:
        own = trust.why_not(whole, trust.OWN, os.environ) is None
    except StorageError as error:
        own, packed_here = None, f"unknown: {error}"
    else:
        packed_here = "yes: --trust-caches own" if own else "no"
    by_place: dict[str, list[int]] = {}
    for member in manifest.members:
        by_place.setdefault(member.path.partition("/")[0], []).append(member.size)
    if as_json:
        document(
            {
                "path": str(path),
                "sha256": caches.sha256,
                "bytes": caches.size,
                "own": own,
                "key": manifest.key,
                "made": manifest.made,
                "differences": differs,
                "places": {name: {"files": len(sizes), "bytes": sum(sizes)} for name, sizes in by_place.items()},
            }
        )
        return
    rows = [("file", f"{plain(str(path))} ({size(caches.size)}, {size(manifest.size)} unpacked)")]
    rows += [("sha256", caches.sha256), ("packed here", plain(packed_here))]
    rows += [(name, plain(value)) for name, value in manifest.key.items()]
    rows += [(f"made: {plain(name)}", plain(str(value))) for name, value in manifest.made.items()]
    rows.append(("this machine", "is the same" if not differs else plain("differs: " + "; ".join(differs))))
    pairs(rows)
    print()
    table(
        [("PLACE", "FILES", "SIZE"), *((plain(n), str(len(s)), size(sum(s))) for n, s in by_place.items())],
        right=frozenset({1, 2}),
    )
