"""``thaw zygote``: the process that has imported everything, started, looked at and stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import examples, plain_app
from .output import Json, document, pairs, plain, size, table

EXAMPLES = """
thaw zygote start
thaw zygote start --model Llama-3-8B/ --import my_app.prompts
thaw zygote status
thaw zygote stop
"""

app = plain_app(add_completion=False)
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Which zygote, where there are several.")]
CacheDir = Annotated[
    str | None,
    typer.Option("--cache-dir", metavar="DIR", help="Keep what is compiled here, for the starts that come."),
]


@app.callback(epilog=examples(EXAMPLES))
def zygote() -> None:
    """Keep a process with vLLM imported, to be forked."""


@app.command(epilog=examples(EXAMPLES, "start"))
def start(
    name: Name = "default",
    model: Annotated[
        list[Path] | None, typer.Option("--model", metavar="DIR", help="Import what this model needs. May be repeated.")
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option("--import", metavar="MODULE", help="Import this, too. May be repeated.")
    ] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Start one in the background, and wait until it takes programs.

    It touches no device and has no thread of its own; a module that starts one, or initialises CUDA, is named and
    refused. Variables that are read at import get the values that they have here.
    """
    from ..engines.vllm.fast_start import cache_variables
    from ..zygote.client import ask
    from ..zygote.place import place
    from ..zygote.start import start as begin

    where = place(name)
    models = [str(path.absolute()) for path in model or []]
    begin(where, imports=module or [], models=models, environment=cache_variables(cache_dir))
    found = ask(where, "status")
    if as_json:
        document(found)
        return
    pairs(_about(found))


@app.command(epilog=examples(EXAMPLES, "status"))
def status(name: Name = "default", as_json: Json = False) -> None:
    """Say what it has imported, how much memory it takes, and which programs run in its forks."""
    from ..zygote.client import ask
    from ..zygote.place import place

    found = ask(place(name), "status")
    if as_json:
        document(found)
        return
    pairs(_about(found))
    if found["programs"]:
        print()
        table([("pid", "processes", "private", "shared", "since", "program"), *map(_program, found["programs"])])


@app.command(epilog=examples(EXAMPLES, "stop"))
def stop(name: Name = "default", as_json: Json = False) -> None:
    """Stop it. Programs that run go on."""
    from ..zygote.client import ask
    from ..zygote.place import place

    where = place(name)
    found = ask(where, "stop")
    while where.socket.exists() and _lives(found["stopped"]):
        time.sleep(0.01)
    if as_json:
        document(found)
        return
    running = found["running"]
    print(f"stopped; {running} program{' goes' if running == 1 else 's go'} on" if running else "stopped")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _about(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory = found["memory"]
    rows = [
        ("zygote", f"{found['name']}, pid {found['pid']}, since {_clock(found['since'])}"),
        ("imports", f"{len(found['modules'])} modules with all they need, in {found['import_seconds']:.1f} s"),
        ("vLLM", f"{found['vllm']}, Python {found['python']}"),
        (
            "engines",
            "forked" if found["engines_forked"] else "started anew (spawn); how this vLLM starts them is not known",
        ),
        ("memory", f"{size(memory['resident'])}, of which {size(memory['private'])} are its own and not shared"),
        ("programs", f"{len(found['programs'])} running, {found['ended']} ended"),
    ]
    if found["left_out"]:
        rows.append(("not there", ", ".join(found["left_out"])))
    if found["unsound"]:
        rows.append(("cannot fork", f"{found['unsound']}; stop it and start it again"))
    if found["changed"]:
        rows.append(("outdated", f"{plain(found['changed'])} has changed; it ends when it is asked to run something"))
    return rows


def _program(about: dict[str, Any]) -> tuple[str, ...]:
    memory = about["memory"]
    return (
        str(about["pid"]),
        str(about["processes"]),
        size(memory["private"]),
        size(memory["resident"] - memory["private"]),
        _clock(about["started"]),
        plain(" ".join(map(str, about["arguments"]))),
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
