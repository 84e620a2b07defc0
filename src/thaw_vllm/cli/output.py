"""How commands answer: one JSON document, or lines a person reads; nothing else on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead, and nothing else.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]


def document(value: Any) -> None:
    """Print ``value`` as the one JSON document of this command."""
    print(json.dumps(value, indent=2, default=str))


def pairs(rows: list[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def table(rows: list[tuple[str, ...]], right: frozenset[int] = frozenset()) -> None:
    """Print columns padded to their widest cell, never cut, one line a row; ``right`` are those aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def size(count: float) -> str:
    """Bytes as people say them, decimal: ``269.0 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plain(text: str) -> str:
    """``text`` from a file, safe for a terminal: anything that is not printable is escaped."""
    return text if text.isprintable() else repr(text)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and child processes print to standard error meanwhile, so that an answer stays clean."""
    if sys.stdout is None:  # started with standard output closed
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
