"""The commands by name, each imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from keyword import iskeyword
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    *("freeze", "serve", "run", "zygote", "info", "verify", "compress", "convert", "id", "cache", "caches", "kv"),
    *("lend", "swap", "park", "wake"),
    *("checkpoint", "checkout"),
    *("log", "show", "diff", "branch", "export", "import", "pin", "rm", "gc", "fsck"),
    *("doctor", "start-report", "demo", "bench"),
)
"""Each is a file here with a function of its name (``-`` is ``_``; one that is a word of Python's ends with ``_``), or
with a typer ``app`` of several."""


class Commands(TyperGroup):
    """Looks commands up in COMMANDS, so that one that needs much to import costs the others nothing."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        name = module_name(cmd_name)
        module = import_module(f"{__package__}.{name}")
        single = getattr(module, "app", None)
        if single is None:
            single = plain_app(add_completion=False)
            kind, settings = getattr(module, "Command", None), getattr(module, "CONTEXT", None)
            made = single.command(
                cmd_name, cls=kind, context_settings=settings, epilog=examples(getattr(module, "EXAMPLES", None))
            )
            made(getattr(module, name))
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command


def module_name(command: str) -> str:
    """The file of a command, and its function."""
    return command.replace("-", "_") + "_" * iskeyword(command)


def plain_app(**options: Any) -> typer.Typer:
    """A typer application whose help is plain text: a box of 80 columns cuts off the names of options."""
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def examples(text: str | None, command: str = "") -> str | None:
    """Examples as they are written; of one command where a module has several (``thaw kv freeze``)."""
    if text is None:
        return None
    lines = [line for line in text.strip().splitlines() if not command or line.split()[2] == command]
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = plain_app(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"thaw {__version__}")
        raise typer.Exit


@app.callback()
def thaw(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Freeze a running LLM; thaw it anywhere, bit for bit."""
