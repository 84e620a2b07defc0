"""``thaw bench report``: the page and the plots into their files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import StorageError, UsageError
from . import plots
from .page import page
from .results import load

NOTES = "benchmarks-notes.md"
PLOTS = "plots"


@dataclass(frozen=True)
class Written:
    """What was made.

    Attributes:
        page: the file.
        plots: their files.
        runs: how many runs there are.
    """

    page: Path
    plots: list[Path]
    runs: int


def text(results: Path, notes: Path) -> str:
    """The page from the results in a directory and the notes in a file, either of which may be missing."""
    found = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    return page(load(results), re.sub(r"\A# .*\n", "", found))


def report(results: Path, output: Path, with_plots: bool) -> Written:
    """Write ``output``, its plots into ``plots`` beside it; the notes are NOTES beside it.

    Raises:
        MissingDependencyError: plots are to be made and matplotlib is not there; nothing was written.
        StorageError: the directory of ``output``, or that of the results, is not there.
        UsageError: a line of the results is not a record, or there is none; nothing was written.
    """
    if not output.parent.is_dir():
        raise StorageError(f"there is no directory {str(output.parent)!r}; make it, or give another --output")
    if not results.is_dir():
        raise StorageError(f"there is no directory {str(results)!r}; give the one that --record wrote to")
    if with_plots:
        plots.require()
    runs = load(results)
    if not runs:
        raise UsageError(f"{str(results)!r} holds no records; measure with --record first")
    made = text(results, output.with_name(NOTES))
    drawn = plots.draw(runs, output.parent / PLOTS) if with_plots else []
    output.write_text(made, encoding="utf-8")
    return Written(output, drawn, len(runs))
