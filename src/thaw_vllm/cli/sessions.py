"""What the commands about sessions have in common: which store, how a session is named, and its text."""

from __future__ import annotations

import re
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
Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="TIME", help="Let thaw gc remove it after so long: 7d, 12h, 30m, or seconds."),
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


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def ttl_seconds(given: str | None) -> float | None:
    """What ``--ttl`` says.

    Raises:
        UsageError: it is no time above 0.
    """
    from ..errors import UsageError
    from ..sessions.record import expiry

    if given is None:
        return None
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhd]?)", given.strip())
    try:
        if found is None:
            raise UsageError("it is none of these")
        seconds = float(found[1]) * _UNITS[found[2]]
        expiry(0, seconds)
    except UsageError:
        raise UsageError(
            f"--ttl must be a time above 0, of at most 136 years, as 7d, 12h, 30m, 90s or 90 (seconds), not {given!r}"
        ) from None
    return seconds


def lifetime(expires: float | None) -> str:
    """When it expires, or that it has; empty where it does not."""
    if expires is None:
        return ""
    left = expires - time.time()
    return f"expires in {_span(left)}" if left > 0 else "expired"


def expiry_row(expires: float | None) -> list[tuple[str, str]]:
    """When a session expires, as a row about it; none where it does not."""
    return [] if expires is None else [("until", f"{when(expires)}, {lifetime(expires)}")]


def _span(seconds: float) -> str:
    """A time as people say it."""
    for unit, size, least in (("days", 86400, 129600), ("h", 3600, 5400), ("min", 60, 100)):
        if seconds >= least:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"


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
