"""Options and endings that the commands of ``thaw bench`` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import document, plain, table

if TYPE_CHECKING:
    from ..bench.ceilings import Settings
    from ..bench.outcome import Outcome

Directories = Annotated[
    list[Path] | None, typer.Option("--dir", help="Where files go; repeat for more. [default: /dev/shm and .]")
]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:N or cpu. [default: cuda where torch finds a GPU]", metavar="NAME")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of limits. [default: what thaw chooses]")]
Recording = Annotated[bool, typer.Option("--record", help="Append to benchmarks/results/<date>.jsonl.")]
LimitSize = Annotated[float, typer.Option("--limit-gb", min=0.01, help="GB moved in a run of a limit.")]
Systems = Annotated[
    list[str] | None, typer.Option("--system", help="Only this system; repeat for more. [default: all]", metavar="NAME")
]
Weighted = Annotated[Path, typer.Option(help="A model directory with safetensors files.")]
OneDirectory = Annotated[Path | None, typer.Option("--dir", help="Where the files go. [default: /dev/shm, else .]")]
EngineRuns = Annotated[int, typer.Option(min=1, help="How often each is measured in its engine.")]
Eager = Annotated[
    bool | None, typer.Option("--eager/--graphs", help="Without or with CUDA graphs. [default: with, on a GPU]")
]
EngineArguments = Annotated[
    list[str] | None, typer.Option(help="An engine argument, its value in JSON; repeat.", metavar="KEY=VALUE")
]


def tell(line: str) -> None:
    typer.echo(line, err=True)


def places(directories: list[Path] | None) -> list[Path]:
    from ..errors import StorageError

    for place in directories or ():
        if not place.is_dir():
            raise StorageError(f"there is no directory {str(place)!r}; make it, or give another --dir")
    return directories or [place for place in (Path("/dev/shm"), Path(".")) if place.is_dir()]


def chosen(given: list[str] | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    from ..errors import UsageError

    for name in given or ():
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return tuple(dict.fromkeys(given)) if given else known


def limit_settings(device: str | None, size_gb: float, runs: int, threads: int | None) -> Settings:
    import torch

    from ..bench.ceilings import Settings
    from ..errors import UsageError
    from ..transport.parallel import default_workers

    there = torch.cuda.is_available()
    chosen = device or ("cuda" if there else "cpu")
    if chosen != "cpu" and (chosen.partition(":")[0] != "cuda" or not there):
        raise UsageError(f"there is no device {chosen!r} here; --device takes cuda, cuda:N or cpu")
    return Settings(chosen, int(size_gb * 1e9), runs, threads or default_workers())


def finish(outcome: Outcome, record: bool, as_json: bool) -> None:
    from ..bench.summary import failures, tables
    from ..bench.summary import plain as plainly

    if as_json:
        document(plainly(outcome))
    else:
        for title, rows in tables(outcome).items():
            print(f"{plain(title)}\n")
            table(rows, right=frozenset(range(1, 6)))
            print()
        print("\n".join(failures(outcome.missed)))
    end(outcome, record)


def of_two_engines(
    model: Path,
    tokens: list[int] | None,
    directory: Path | None,
    runs: int,
    eager: bool | None,
    engine_arg: list[str] | None,
    limit_gb: float,
) -> dict[str, Any]:
    """What ``kv.Settings`` are made of."""
    from .freeze import parse_engine_arg

    return {
        "model": model,
        "tokens": tuple(tokens or ()),
        "directory": places([directory] if directory else None)[0],
        "runs": runs,
        "eager": eager,
        "engine_args": dict(parse_engine_arg(text) for text in engine_arg or []),
        "limits": limit_settings(None, limit_gb, runs, None),
    }


def shown(outcome: Outcome, rows: Callable[[Outcome], Any], right: Iterable[int], record: bool, as_json: bool) -> None:
    """All of it as a document, or rows and what is missing."""
    from ..bench.summary import failures
    from ..bench.summary import plain as plainly

    if as_json:
        document(plainly(outcome))
    else:
        table(rows(outcome), right=frozenset(right))
        print("\n".join(failures(outcome.missed)))
    end(outcome, record)


def require_all_of_thaw(outcome: Outcome) -> None:
    """Exit code 1 when something of thaw's own could not be measured."""
    if any(missed.system == "thaw" for missed in outcome.missed):
        raise typer.Exit(1)


def end(outcome: Outcome, record: bool) -> None:
    """Keep the records; exit code 1 when a system gave other bytes or tokens, or nothing could be measured.

    Raises:
        KeyboardInterrupt: the measurement was interrupted, and what there was is kept.
    """
    from ..bench.record import append

    if record and outcome.records:
        tell(f"recorded in {append(outcome.records)}")
    for wrong in outcome.wrong:
        what = wrong.extra.get("different") or "tokens"
        tell(f"NOT EQUAL: {wrong.work}, {wrong.system} ({wrong.route}): {what}")
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.wrong or not outcome.records:
        raise typer.Exit(1)
