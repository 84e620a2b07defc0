"""A start report as one HTML file: a chart of its processes in SVG, and a table. No scripts, nothing from elsewhere."""

from __future__ import annotations

import os
from html import escape

from ...transport.writer import StagedFile
from .start_report import PHASES, Process, StartReport

_WIDTH, _ROW, _LEFT = 1000.0, 22, 10
_NARROW = 6.5
"""Pixels of a character: a label that does not fit into its bar is left to the title."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #d5d9de; --page: #ffffff; --light: 72%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --faint: #3a4048; --page: #14171b; --light: 36%; }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem; }
svg { width: 100%; max-width: 1020px; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg line { stroke: var(--faint); }
svg rect { stroke: var(--page); }
table { border-collapse: collapse; margin-top: 1rem; }
td, th { padding: 0.15rem 0.9rem 0.15rem 0; text-align: left; border-bottom: 1px solid var(--faint); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def write(report: StartReport, target: str | os.PathLike[str], *, force: bool = False) -> None:
    """The page into a file, which appears whole or not at all.

    Raises:
        ExistsError, StorageError, UsageError: as any file of thaw's.
    """
    content = page(report).encode()
    with StagedFile(target, len(content), force=force, mode=0o644) as file:
        file.write(0, content)
        file.publish()


def page(report: StartReport) -> str:
    """The whole file."""
    until = "first token" if report.first_token else "end of what was recorded"
    title = f"A vLLM start: {report.total:.2f} s until the {until}"
    rows = "\n".join(
        f'<tr><td>{escape(phase.name)}</td><td class="number">{phase.begin:.3f}</td>'
        f'<td class="number">{phase.end:.3f}</td><td class="number">{phase.seconds:.3f}</td>'
        f'<td class="number">{phase.seconds / max(report.total, 1e-9):.1%}</td></tr>'
        for phase in report.phases
    )
    skipped = f"<p>Skipped lines, of other starts or no events: {report.skipped}.</p>" if report.skipped else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_chart(report, title)}
<table>
<caption>The wall clock by phase: a moment counts for the innermost process that is busy.</caption>
<tr><th>phase</th><th class="number">begin</th><th class="number">end</th><th class="number">seconds</th>
<th class="number">share</th></tr>
{rows}
<tr><th>total</th><td></td><td></td><td class="number">{report.total:.3f}</td><td></td></tr>
</table>
{skipped}
</body>
</html>
"""


def _chart(report: StartReport, title: str) -> str:
    scale = (_WIDTH - _LEFT) / max(report.total, 1e-9)
    parts: list[str] = []
    top = _ROW
    for process in report.processes:
        levels = _levels(process)
        what = process.role if process.name in ("", "MainProcess") else f"{process.role}, {process.name}"
        parts.append(f'<text x="{_LEFT}" y="{top + 15}">{escape(f"{what} (pid {process.pid})")}</text>')
        top += _ROW
        for span, level in zip(process.spans, levels, strict=True):
            left, width = _LEFT + span.begin * scale, max((span.end - span.begin) * scale, 0.5)
            y, seconds = top + level * _ROW, f"{span.end - span.begin:.2f} s"
            said = f"{span.phase}: {seconds}, of which {span.self_seconds:.2f} s its own, from {span.begin:.2f} s"
            label = f"{span.phase} {seconds}"
            text = f'<text x="{left + 4:.1f}" y="{y + 15}">{escape(label)}</text>'
            parts.append(
                f'<g><title>{escape(said)}</title><rect x="{left:.1f}" y="{y + 1}" width="{width:.1f}" '
                f'height="{_ROW - 2}" rx="2" style="fill: {_colour(span.phase)}"/>'
                f"{text if len(label) * _NARROW + 6 < width else ''}</g>"
            )
        top += (max(levels, default=0) + 1) * _ROW + 6
    return (
        f'<svg role="img" aria-label="{escape(title, quote=True)}" viewBox="0 0 {_WIDTH + 20:.0f} {top + 4}" '
        f'xmlns="http://www.w3.org/2000/svg">\n' + "\n".join([*_grid(report.total, scale, top), *parts]) + "\n</svg>"
    )


def _grid(total: float, scale: float, height: int) -> list[str]:
    """A line every so many seconds, about ten in all."""
    step = next((s for s in (0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600) if total / s <= 12), total / 10 or 1.0)
    found = []
    for number in range(int(total / step) + 1):
        x = _LEFT + number * step * scale
        found.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{height}"/>')
        found.append(f'<text x="{x:.1f}" y="12">{number * step:g} s</text>')
    return found


def _levels(process: Process) -> list[int]:
    """In which row of its lane each span goes: below those that it lies in, or overlaps."""
    ends: list[float] = []
    found = []
    for span in process.spans:
        row = max((level + 1 for level, end in enumerate(ends) if end > span.begin), default=0)
        ends[row:] = [span.end]
        found.append(row)
    return found


def _colour(phase: str) -> str:
    """One for each phase, in two lightnesses; phases that nobody knows are grey."""
    if phase not in PHASES:
        return "hsl(0 0% var(--light))"
    return f"hsl({PHASES.index(phase) * 137 % 360} 55% var(--light))"
