"""What the commands about sessions have in common: which store, how a session is named, and its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import plain

if TYPE_CHECKING:
    from ..sessions.record import Head
    from ..sessions.store import Store

SHOWN = 12
"""Digits of an id that a table shows."""

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store. [default: $THAW_SESSIONS_DIR, else ~/.local/share/thaw/sessions]",
    ),
]
SessionArgument = Annotated[
    str, typer.Argument(metavar="SESSION", help="An id of thaw log, 4 or more of its first digits, or a label.")
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="TEXT", help="A name of yours for it; may be repeated.")
]
ShowText = Annotated[bool, typer.Option("--show-text", help="With the text, which a store does not show unasked.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Model directory for --show-text. [default: that of the session]"),
]


def opened(store: str | None) -> Store:
    """The store that an option names.

    Raises:
        StorageError, FormatError: there is none.
    """
    from ..sessions.store import Store

    return Store(store)


def when(seconds: float) -> str:
    """A moment, in this machine's time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def print_text(name: str, text: str) -> None:
    """A text below its name, line by line, safe for a terminal."""
    print(f"\n{name}:")
    print("\n".join(plain(line) for line in text.split("\n")))


def state(head: Head) -> str:
    """What became of generating."""
    return "open" if head.finished is None else f"finished: {plain(head.finished)}"


def decoder(chosen: Path | None, *heads: Head) -> Callable[[list[int]], str]:
    """Token ids to text, by the tokenizer that was chosen, else the sessions' own.

    Raises:
        UsageError: there is none.
    """
    from ..errors import UsageError
    from .prefixes import decoder

    if chosen is None:
        sources = [head.source for head in heads if head.source is not None]
        if not sources:
            raise UsageError("it is not known where this session's tokenizer is; --tokenizer DIR names it")
        chosen = Path(sources[0])
        if not chosen.is_dir():
            raise UsageError(
                f"the session's tokenizer was in {plain(sources[0])!r}, which is not a directory here; --tokenizer DIR "
                "names one"
            )
    return decoder(chosen)
