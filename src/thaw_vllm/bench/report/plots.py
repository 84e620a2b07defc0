"""A bar chart a work, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError
from ..outcome import Outcome
from ..record import Record
from ..summary import label, limit_of
from .page import PLOTTED, TITLES, first
from .results import Run

OURS, THEIRS, WRONG = "#6baed6", "#c8c8c8", "#e57373"


def require() -> None:
    """
    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError:
        raise MissingDependencyError(
            "the plots need matplotlib: pip install matplotlib; --no-plots makes the page alone"
        ) from None


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the plots of every work in PLOTTED that has records; returns the files."""
    written: list[Path] = []
    for work in PLOTTED:
        for run in first(work, runs)[:1]:
            folder.mkdir(parents=True, exist_ok=True)
            records = [record for record in run.outcome.records if record.work == work]
            written += _draw(work, records, run.outcome, folder)
    return written


def _draw(work: str, records: list[Record], outcome: Outcome, folder: Path) -> list[Path]:
    pyplot: Any = _pyplot()
    bars = sorted(records, key=lambda record: record.gb_per_s)
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.42 * len(bars)), layout="constrained")
    colours = [WRONG if r.equal is False else OURS if r.system == "thaw" else THEIRS for r in bars]
    places = [str(record.extra.get("directory", "")) for record in bars]
    names = [label(record) for record in bars]
    if len(set(places)) > 1:  # bars of one name would lie upon each other
        names = [f"{name}, {place}" for name, place in zip(names, places, strict=True)]
    drawn = axes.barh(names, [record.gb_per_s for record in bars], color=colours)
    axes.bar_label(drawn, fmt="%.1f", label_type="center")  # at the end of a bar the limit's line would cross it
    limit = limit_of(bars[-1], outcome)
    if limit is not None:
        axes.axvline(limit.gb_per_s, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{TITLES[work]}; dashed: the limit, {limit.gb_per_s:.1f} GB/s", fontsize=10)
    else:
        axes.set_title(TITLES[work], fontsize=10)
    axes.set_xlabel("GB/s")
    axes.set_xlim(0, 1.12 * max(bars[-1].gb_per_s, limit.gb_per_s if limit is not None else 0))
    axes.spines[["top", "right"]].set_visible(False)
    paths = [folder / f"{work}.png", folder / f"{work}.svg"]
    figure.savefig(paths[0], dpi=120, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return paths


def _pyplot() -> Any:
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "thaw"  # the same results give the same file
    return import_module("matplotlib.pyplot")
