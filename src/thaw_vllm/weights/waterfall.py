"""Where the time of a freeze or restore went, as text."""

from __future__ import annotations

from collections.abc import Mapping


def waterfall(seconds: Mapping[str, float], width: int = 40) -> str:
    """One line a phase, in order, each bar beginning where the one before it ended.

    Args:
        seconds: by phase; ``total`` is the length of the chart, and is not a phase.
        width: characters of the longest bar.
    """
    phases = {name: value for name, value in seconds.items() if name != "total"}
    total = max(seconds.get("total", 0.0), sum(phases.values()), 1e-9)
    label = max((len(name) for name in phases), default=0)
    lines, begun = [], 0.0
    for name, value in phases.items():
        first = min(round(begun / total * width), width - 1)
        last = max(round((begun + value) / total * width), first + 1)
        bar = (" " * first + "█" * (last - first)).ljust(width)
        lines.append(f"{name:<{label}}  {bar}  {value:7.3f} s  {value / total:4.0%}")
        begun += value
    return "\n".join(lines)
