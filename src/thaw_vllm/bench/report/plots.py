"""A bar chart a work, and one of prompts by their length, as PNG and SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError
from ..outcome import Outcome
from ..record import Record
from ..summary import general, label, limit_of, prompt_tokens, with_restore
from .page import KV_PLOT, KV_PLOTTED, KV_TITLE, PLOTTED, TITLES, first
from .results import Run

_WIDTH = 56
"""Letters in a line of a bar's name."""
OURS, THEIRS, WRONG = "#6baed6", "#c8c8c8", "#e57373"
KV_LINES = (
    ("ttft-cold", "cold: nothing cached", {"color": "#636363", "marker": "o"}),
    ("with restore", "restore and thawed first token", {"color": "#08519c", "marker": "s"}),
    ("ttft-thawed", "thawed, fresh engine", {"color": OURS, "marker": "^"}),
    ("ttft-prefix", "prefix cache, same engine", {"color": "#969696", "marker": ".", "linestyle": "--"}),
)
"""What is drawn of prompts, its name, and how."""


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
    """Write the plots of every work in PLOTTED that has records, and of prompts; returns the files."""
    written: list[Path] = []
    for work in PLOTTED:
        for run in first(work, runs)[:1]:
            folder.mkdir(parents=True, exist_ok=True)
            records = [r for r in run.outcome.records if r.work == work or (work != general(work) == general(r.work))]
            written += _draw(work, records, run.outcome, folder)
    for run in first(KV_PLOTTED, runs)[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        written += _draw_prompts(run.outcome.records, folder)
    return written


def _draw_prompts(records: Sequence[Record], folder: Path) -> list[Path]:
    seconds: dict[str, dict[int, float]] = {}
    for record in filter(prompt_tokens, records):
        seconds.setdefault(record.work, {})[prompt_tokens(record)] = record.median
        if "with_restore" in record.extra:
            seconds.setdefault("with restore", {})[prompt_tokens(record)] = with_restore(record)
    pyplot: Any = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, told, how in KV_LINES:
        points = sorted(seconds.get(name, {}).items())
        if points:
            axes.plot(*zip(*points, strict=True), label=told, **how)
    lengths = sorted(seconds[KV_PLOTTED])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_title(KV_TITLE, fontsize=10)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds")
    axes.grid(axis="y", which="both", linewidth=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, KV_PLOT, folder)


def _draw(work: str, records: list[Record], outcome: Outcome, folder: Path) -> list[Path]:
    pyplot: Any = _pyplot()
    bars = sorted(records, key=lambda record: record.gb_per_s)
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.45 * len(bars)), layout="constrained")
    colours = [WRONG if r.equal is False else OURS if r.system == "thaw" else THEIRS for r in bars]
    places = [str(record.extra.get("directory", "")) for record in bars]
    names = [label(record) for record in bars]
    if len(set(places)) > 1:  # bars of one name would lie upon each other
        names = [f"{name}, {place}" for name, place in zip(names, places, strict=True)]
    names = [textwrap.fill(name, _WIDTH) for name in names]
    drawn = axes.barh(names, [record.gb_per_s for record in bars], color=colours)
    axes.bar_label(drawn, fmt="%.1f", label_type="center")  # at the end of a bar the limit's line would cross it
    limit = limit_of(bars[-1], outcome)
    if limit is not None:
        axes.axvline(limit.gb_per_s, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{TITLES[work]}; dashed: the limit, {limit.gb_per_s:.1f} GB/s", fontsize=10, loc="right")
    else:
        axes.set_title(TITLES[work], fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("GB/s")
    axes.set_xlim(0, 1.12 * max(bars[-1].gb_per_s, limit.gb_per_s if limit is not None else 0))
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, work, folder)


def _saved(figure: Any, name: str, folder: Path) -> list[Path]:
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=120, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    return paths


def _pyplot() -> Any:
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "thaw"  # the same results give the same file
    return import_module("matplotlib.pyplot")
