"""The ``thaw`` command: which commands there are, and how every way of ending becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, cast

INTERRUPTED = 130
PIPE_CLOSED = 141
"""As a shell reports a process ended by SIGINT, and by SIGPIPE."""
PACKAGES = ("blake3", "numpy", "rich", "torch", "typer", "xxhash")
"""What thaw is installed with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (docs/cli.md) and never raises what a user can cause.

    Args:
        arguments: without the program's name; None for the process's own.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a path or a name may hold what the terminal's encoding lacks
                stream.reconfigure(errors="backslashreplace")
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        if sys.stdout is not None:  # None where the process was started without one
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = PIPE_CLOSED
    except OSError as error:
        code = _refused(error)
    except SystemExit as exit:
        # typer turns a closed pipe into exit code 1, silently.
        closed = isinstance(exit.__context__, BrokenPipeError)
        code = PIPE_CLOSED if closed else exit.code if isinstance(exit.code, int) else 1
    if code == INTERRUPTED:
        _say("interrupted; nothing is left half-written")
    if code:
        _let_go_of_output()
    return code


def _run(arguments: list[str]) -> int:
    from ..errors import ThawError

    try:
        return _command(arguments)
    except ThawError as error:
        _say(f"error: {error}")
        return error.exit_code
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except OSError as error:
        return _refused(error)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
            _say(f"error: {error.name} is not installed; pip install {error.name}")
            return 7
        if _debugging():
            traceback.print_exc()
        else:
            _say(f"error: unexpected {_one_line(error)}")
            _say("THAW_DEBUG=1 shows where it happened; if thaw is at fault, please report it with that")
        return 1


def _command(arguments: list[str]) -> int:
    import typer

    from .commands import app

    # Click's own classes, which typer carries with it in some versions and takes from click in others.
    usage_error: type[Any] = typer.BadParameter.__mro__[1]
    click_error: type[Any] = typer.BadParameter.__mro__[2]
    try:
        answer = app(arguments or ["--help"], prog_name="thaw", standalone_mode=False)
        return answer if isinstance(answer, int) else 0
    except typer.Abort:
        return INTERRUPTED
    except click_error as error:
        hint = f" ({_named(app, arguments)} --help shows what it takes)" if isinstance(error, usage_error) else ""
        _say(f"error: {error.format_message()}{hint}")
        return int(error.exit_code)


def _named(app: Any, arguments: list[str]) -> str:
    """The command that arguments begin with; click tells ``thaw`` where an option lacks its value."""
    from typer.main import get_command

    found, command = ["thaw"], cast(Any, get_command(app))
    for word in arguments:
        below = command.get_command(None, word) if hasattr(command, "get_command") else None
        if below is None:
            break
        found.append(word)
        command = below
    return " ".join(found)


def _refused(error: OSError) -> int:
    """What the file system said where nobody gave it better words, such as a full disk under standard output."""
    if _debugging():
        traceback.print_exc()
    named = f": {str(error.filename)!r}" if error.filename else ""
    _say(f"error: {error.strerror or error}{named}")
    return 6


def _let_go_of_output() -> None:
    """A stream that takes no more would make Python complain at its end, and end with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _debugging() -> bool:
    return os.environ.get("THAW_DEBUG", "0") not in ("", "0")


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening
        print(text, file=sys.stderr, flush=True)
