"""``thaw start-report``: what a start of vLLM spent its time on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .output import Force, Json, document, pairs, plain

EXAMPLES = """
THAW_START_REPORT=start/ vllm serve Llama-3-8B/
thaw start-report start/
thaw start-report start/ --html start.html
thaw start-report start/ --json | jq .total
"""

_PACKAGES = 4


def start_report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What THAW_START_REPORT named when vLLM started.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with a chart of all processes, too.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show where a start of vLLM spent its time.

    With THAW_START_REPORT=DIR each process of vLLM notes its phases there. The last start in DIR is shown, up to its
    first token. A phase's seconds are what it adds to the wall clock.
    """
    from ..engines.vllm.start_page import write
    from ..engines.vllm.start_report import read

    found = read(directory)
    if html is not None:
        write(found, html, force=force)
    if as_json:
        document(found.to_json())
        return
    until = "first token" if found.first_token else "end of what was recorded; no token has come"
    rows = [("total", f"{found.total:.3f} s, until the {until}")]
    for process in found.processes:
        rows.append((process.role, f"pid {process.pid}, from {process.created:.3f} s"))
        if process.imported:
            rows.append(("imported", f"{len(process.imported)} modules since its fork: {_packages(process.imported)}"))
    rows += [("caches", plain(line)) for line in found.compiling()]
    if found.skipped:
        rows.append(("skipped lines", f"{found.skipped}, of other starts or no events"))
    if html is not None:
        rows.append(("page", plain(str(html))))
    pairs(rows)
    print()
    print("\n".join(plain(line) for line in found.waterfall().splitlines()))


def _packages(modules: Sequence[str]) -> str:
    """The packages that most of them belong to."""
    counted = Counter(name.partition(".")[0] for name in modules).most_common()
    told = ", ".join(f"{plain(name)} ({count})" for name, count in counted[:_PACKAGES])
    return told + (", …" if len(counted) > _PACKAGES else "")
