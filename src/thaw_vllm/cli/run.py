"""``thaw run``: a Python program in a fork of the zygote, as if Python had been started for it."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .output import Json, document
from .zygote import CacheDir

EXAMPLES = """
thaw run script.py --its-own --options
thaw run -m my_app --its-own
thaw run --detach script.py > out.log 2>&1
thaw run --fallback script.py
"""

_WITH_A_VALUE = ("--zygote", "--cache-dir")


class Command(TyperCommand):
    """Leaves everything after the script, or after -m MODULE and -c CODE, to the program, as python does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Mark where the program's own arguments begin."""
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] != "--":
            if args[at][:2] in ("-m", "-c"):
                rest = at + 2 if len(args[at]) == 2 else at + 1  # -m json.tool, -mjson.tool
                args = [*args[:rest], "--", *args[rest:]] if rest <= len(args) else args
                break
            at += 2 if args[at] in _WITH_A_VALUE else 1
        ctx.allow_interspersed_args = False
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def run(
    program: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT", help="A script, and what follows are its own arguments.")
    ] = None,
    module: Annotated[str | None, typer.Option("-m", metavar="MODULE", help="Run a module, as python -m does.")] = None,
    code: Annotated[str | None, typer.Option("-c", metavar="CODE", help="Run these lines, as python -c does.")] = None,
    zygote: Annotated[str, typer.Option("--zygote", metavar="NAME", help="Which one to fork.")] = "default",
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the program's pid, and let it run on by itself.")
    ] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Where no zygote can run it, start Python, say why, and go on.")
    ] = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Run a Python program in a fork of the zygote.

    vLLM and torch are imported there already. Environment, working directory, terminal, standard streams, signals and
    exit code are as if python had been started in its place. When this command is killed, the program is ended, and so
    is all that it started.
    """
    from ..engines.vllm.fast_start import cache_variables
    from ..errors import StorageError, UsageError

    arguments = list(program or [])
    if module is not None and code is not None:
        raise UsageError("-m and -c exclude one another")
    if module is not None or code is not None:
        arguments.insert(0, str(module if module is not None else code))
    if not arguments:
        raise UsageError("there is no program; give a script, -m MODULE or -c CODE")
    kind = "module" if module is not None else "code" if code is not None else "script"
    if kind == "script" and not os.path.isfile(arguments[0]):
        raise StorageError(f"there is no script {arguments[0]!r}")
    if as_json and not detach:
        raise UsageError("--json needs --detach: otherwise standard output is the program's")
    os.environ.update(cache_variables(cache_dir))
    hand_over(arguments, kind, zygote, detach=detach, fallback=fallback, as_json=as_json)


def hand_over(
    arguments: list[str], kind: str, zygote: str, *, detach: bool = False, fallback: bool = False, as_json: bool = False
) -> None:
    """Run a program in the zygote; returns only where it is detached.

    Raises:
        ThawError: no zygote, or it refuses, and there is no ``fallback``.
    """
    from ..errors import ThawError, UsageError
    from ..zygote.client import Handed
    from ..zygote.place import place
    from ..zygote.program import FLAGS

    try:
        handed = Handed(place(zygote), arguments, kind, detached=detach)
    except ThawError as error:
        if not fallback:
            raise
        if detach:
            raise UsageError(f"{error} (--fallback does not detach)") from None
        print(f"thaw: started without a zygote: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *FLAGS[kind], *arguments])
    if not detach:
        handed.stand_for()
    handed.leave()
    if as_json:
        document({"pid": handed.pid})
    else:
        print(handed.pid)
