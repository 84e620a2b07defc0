"""``thaw bench``: how fast this machine is with thaw, with its rivals, and at the most."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import examples, plain_app
from .output import Json, document, plain, table

if TYPE_CHECKING:
    from ..bench.restore import Comparison

EXAMPLES = """
thaw bench restore
thaw bench restore --size-mb 4000 --dir /dev/shm --dir /mnt/nvme --rounds 9
"""

app = plain_app(add_completion=False)


@app.callback(invoke_without_command=True)
def bench(ctx: typer.Context) -> None:
    """Measure thaw, the hardware's limit and a rival.

    Each benchmark runs them in one process, in alternation. Without a name, all of them run.
    """
    if ctx.invoked_subcommand is None:
        restore()


@app.command(epilog=examples(SimpleNamespace(EXAMPLES=EXAMPLES)))
def restore(
    size_mb: Annotated[int, typer.Option(min=1, help="Size of the made-up model.")] = 1000,
    directory: Annotated[
        list[Path] | None, typer.Option("--dir", help="Where the files go; repeat for more. [default: /dev/shm and .]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 7,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. [default: what thaw chooses]")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append to benchmarks/results/<date>.jsonl.")] = False,
    as_json: Json = False,
) -> None:
    """Restore a model into host memory.

    Compared are thaw with and without checksums, safetensors, and plain reads. safetensors is load_file() and
    load_state_dict() into the same tensors. The files are in the page cache. thaw verify is compared with reading
    the same file by as many threads and keeping nothing.
    """
    from ..bench.record import append
    from ..bench.restore import compare

    places = directory or [p for p in (Path("/dev/shm"), Path(".")) if p.is_dir()]
    found = []
    for place in places:
        found.append(compare(place, size_mb * 10**6, rounds, workers))
        if not as_json:
            _show(found[-1], rounds)
    if as_json:
        document([_plain(comparison) for comparison in found])
    if record:
        path = append(record for comparison in found for record in comparison.records.values())
        typer.echo(f"recorded in {path}", err=True)


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        "directory": comparison.directory,
        "records": [record.to_json() for record in comparison.records.values()],
        "ratios": [
            {"ours": ours, "theirs": theirs, **dict(zip(("median", "low", "high"), values, strict=True))}
            for ours, theirs in comparison.ratios
            for values in [[round(v, 3) for v in comparison.ratio(ours, theirs)]]
        ],
    }


def _show(comparison: Comparison, rounds: int) -> None:
    first = next(iter(comparison.records.values()))
    print(f"{plain(comparison.directory)}: {first.bytes / 1e6:.0f} MB, {rounds} rounds, page cache warm, bytes equal\n")
    lines: list[tuple[str, ...]] = [("", "GB/S", "SECONDS", "LOW", "HIGH", "MIB MORE")]
    for name, record in comparison.records.items():
        peak = "" if record.peak_host_mib is None else f"{record.peak_host_mib:.0f}"
        times = (f"{t:.3f}" for t in (record.median, min(record.seconds), max(record.seconds)))
        lines.append((name, f"{record.gb_per_s:.2f}", *times, peak))
    table(lines, right=frozenset(range(1, 6)))
    print()
    for ours, theirs in comparison.ratios:
        median, low, high = comparison.ratio(ours, theirs)
        print(f"{ours} / {theirs}: {median:.2f}  ({low:.2f} to {high:.2f})")
    print()
