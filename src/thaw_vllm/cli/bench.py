"""``thaw bench``: how fast this machine is with thaw, with its rivals, and at the most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_options import (
    Device,
    Directories,
    Eager,
    EngineArguments,
    EngineRuns,
    LimitSize,
    OneDirectory,
    Recording,
    Systems,
    Threads,
    Weighted,
    chosen,
    end,
    finish,
    limit_settings,
    of_two_engines,
    places,
    require_all_of_thaw,
    shown,
    tell,
)
from .commands import examples, plain_app
from .output import Json, document, plain, table

if TYPE_CHECKING:
    from ..bench.restore import Comparison

EXAMPLES = """
thaw bench restore
thaw bench restore --size-mb 4000 --dir /dev/shm --dir /mnt/nvme --rounds 9
thaw bench limits --dir /dev/shm --dir /mnt/nvme
thaw bench weights --dir /dev/shm --dir /mnt/nvme --record
thaw bench weights --size-gb 2 --dir /dev/shm --system thaw --system safetensors --device cpu
thaw bench freeze --dir /dev/shm --dir /mnt/nvme --runs 3 --record
thaw bench cold-start --model Llama-3-8B/ --snapshot /dev/shm/W.thaw --mode eager --record
thaw bench cold-start --model Llama-3-8B/ --loader default-loader --caches cold --reports starts/
thaw bench cold-start --model Llama-3-8B/ --snapshot llama.thaw --mode graphs --zygote --caches file
thaw bench kv --model Llama-3-8B/ --tokens 1024 --tokens 4096 --record
thaw bench fork --model Llama-3-8B/ --dir /dev/shm --runs 5 --record
thaw bench fork --model Llama-3-8B/ --snapshot /dev/shm/W.thaw --workers 4
thaw bench swap --model Llama-3-8B/ --snapshot /dev/shm/A.thaw --other /dev/shm/B.thaw --record
thaw bench multi-gpu --gpus 2 --dir /dev/shm --record
thaw bench multi-gpu --gpus 4 --dir /dev/shm --model Llama-3-8B/ --record
thaw bench multi-gpu --device cpu --device cpu --size-gb 0.1 --dir /dev/shm
thaw bench report
"""


app = plain_app(add_completion=False)


@app.callback(invoke_without_command=True)
def bench(ctx: typer.Context) -> None:
    """Measure thaw, the hardware's limit and rivals.

    Without a name, restore runs. docs/benchmarks.md has the method, and results made from what --record kept.
    """
    if ctx.invoked_subcommand is None:
        restore()


@app.command(epilog=examples(EXAMPLES, "restore"))
def restore(
    size_mb: Annotated[int, typer.Option(min=1, help="Size of the made-up model.")] = 1000,
    directory: Annotated[
        list[Path] | None, typer.Option("--dir", help="Where the files go; repeat for more. [default: /dev/shm and .]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 7,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. [default: what thaw chooses]")] = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Restore a model into host memory.

    Compared are thaw with and without checksums, safetensors, and plain reads. safetensors is load_file() and
    load_state_dict() into the same tensors. The files are in the page cache. thaw verify is compared with reading
    the same file by as many threads and keeping nothing.
    """
    from ..bench.record import append
    from ..bench.restore import compare

    found = []
    for place in directory or [p for p in (Path("/dev/shm"), Path(".")) if p.is_dir()]:
        found.append(compare(place, size_mb * 10**6, rounds, workers))
        if not as_json:
            _show(found[-1], rounds)
    if as_json:
        document([_plain(comparison) for comparison in found])
    if record:
        path = append(record for comparison in found for record in comparison.records.values())
        tell(f"recorded in {path}")


@app.command(epilog=examples(EXAMPLES, "limits"))
def limits(
    directory: Directories = None,
    size_gb: Annotated[float, typer.Option(min=0.01, help="GB moved in a run.")] = 4.0,
    runs: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    work: Annotated[
        list[str] | None,
        typer.Option(help="h2d, d2h, disk-write, disk-read, tmpfs-write or memory-read; repeat. [default: all]"),
    ] = None,
    threads: Threads = None,
    device: Device = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Measure what the hardware bears: link, disk, memory.

    Page-locked copies to and from the GPU, direct reads and writes of a disk, writes to tmpfs by two routes, reads of
    files in memory. Memory is touched before it is measured: a fresh virtual machine gets it from its host at the
    first touch only, which takes several times as long.
    """
    from ..bench import ceilings

    settings = limit_settings(device, size_gb, runs, threads)
    works = chosen(work, ceilings.WORKS, "work")
    finish(ceilings.measure(works, places(directory), settings, tell), record, as_json)


@app.command(epilog=examples(EXAMPLES, "weights"))
def weights(
    directory: Directories = None,
    size_gb: Annotated[float, typer.Option(min=0.001, help="About how large the made-up model is.")] = 16.06,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each system.")] = 3,
    cold_runs: Annotated[int | None, typer.Option(min=1, help="The same for cold disks. [default: --runs]")] = None,
    work: Annotated[
        list[str] | None,
        typer.Option(help="restore-tmpfs, restore-pagecache, restore-disk or restore-warm; repeat. [default: all]"),
    ] = None,
    only: Systems = None,
    device: Device = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the files for the next run of the same size.")] = False,
    limit_gb: LimitSize = 4.0,
    threads: Threads = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Restore a model by thaw and every rival installed.

    Each run is a fresh process. Afterwards every tensor is compared with the source. A directory on tmpfs gives
    restore-tmpfs, another one restore-pagecache and, with the page cache emptied and proved empty, restore-disk.
    A rival that is missing or fails is a line; the others go on.
    """
    from ..bench import weights as measuring

    settings = measuring.Settings(
        tuple(places(directory)),
        chosen(work, measuring.WORKS, "work"),
        chosen(only, measuring.ALL_SYSTEMS, "system"),
        size_gb,
        runs,
        cold_runs or runs,
        keep,
        limit_settings(device, limit_gb, runs, threads),
    )
    finish(measuring.measure(settings, tell), record, as_json)


@app.command(epilog=examples(EXAMPLES, "freeze"))
def freeze(
    directory: Directories = None,
    size_gb: Annotated[float, typer.Option(min=0.001, help="About how large the made-up model is.")] = 16.06,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each system.")] = 3,
    only: Systems = None,
    device: Device = None,
    limit_gb: LimitSize = 4.0,
    threads: Threads = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Freeze a model by thaw and the rivals that can write.

    The file is synced within the time counted, then verified, read back and compared, and removed.
    """
    from ..bench import freezing, weights

    settings = freezing.Settings(
        tuple(places(directory)),
        chosen(only, weights.ALL_SYSTEMS, "system"),
        size_gb,
        runs,
        limit_settings(device, limit_gb, runs, threads),
    )
    finish(freezing.measure(settings, tell), record, as_json)


@app.command("cold-start", epilog=examples(EXAMPLES, "cold-start"))
def cold_start(
    model: Weighted,
    snapshot: Annotated[Path | None, typer.Option(help="Its snapshot, made by thaw freeze.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="eager, graphs or server; repeat. [default: the first two]")
    ] = None,
    loader: Annotated[
        list[str] | None,
        typer.Option(
            help="default-loader, snapshot, checkpoint, these with -zygote or -fast-start, or one of vLLM's load "
            "formats; repeat. [default: all]",
            metavar="NAME",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each loader and mode.")] = 1,
    caches: Annotated[
        str,
        typer.Option(
            help="warm: kernels compiled before; cold: none, for every start; file: those of a file of caches, which "
            "is packed first.",
            metavar="KIND",
        ),
    ] = "warm",
    reports: Annotated[
        Path | None, typer.Option(help="Keep every start's report here, as JSON and HTML, and its log.", metavar="DIR")
    ] = None,
    zygote: Annotated[
        bool, typer.Option("--zygote", help="Start in forks of a zygote, too; not with --caches cold.")
    ] = False,
    fast_start: Annotated[
        bool, typer.Option("--fast-start", help="Start with the preset of thaw serve --fast-start, too; needs a GPU.")
    ] = False,
    engine_arg: EngineArguments = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Start vLLM by every loader, from the process to its first token.

    vLLM's own loader, thaw from a snapshot, thaw from the checkpoint, and vLLM's load formats whose packages are
    installed. Tokens are compared. A first start, which also compiles kernels, is not counted, unless every start is
    given empty caches. With --caches file each is a start on a new machine that was brought a file (thaw caches pack),
    and the first one, with nothing compiled, is shown as well. Shown is also what each phase of a start took (thaw
    start-report).
    """
    from ..bench import cold_start as measuring
    from ..bench.summary import failures, phase_tables, seconds_table
    from ..bench.summary import plain as plainly
    from ..engines.vllm.api import require_vllm_installed
    from .freeze import parse_engine_arg

    settings = measuring.Settings(
        model,
        snapshot,
        chosen(mode, tuple(measuring.MODES), "mode") if mode else ("eager", "graphs"),
        tuple(loader or ()),
        runs,
        {"max_model_len": 2048} | dict(parse_engine_arg(text) for text in engine_arg or []),
        caches=chosen([caches], (measuring.WARM, measuring.COLD, measuring.FILE), "kind of caches")[0],
        reports=reports,
        zygote=zygote,
        fast_start=fast_start,
    )
    require_vllm_installed()
    outcome = measuring.measure(settings, tell)
    if as_json:
        document(plainly(outcome))
    elif outcome.records:
        table(seconds_table(outcome.records), right=frozenset({2, 3, 4}))
        for work, rows in phase_tables(outcome.records).items():
            print(f"\n{work}, seconds of the wall clock by phase\n")
            table(rows, right=frozenset(range(1, len(rows[0]))))
    if not as_json:
        print("\n".join(failures(outcome.missed)))
    end(outcome, record)


@app.command(epilog=examples(EXAMPLES, "kv"))
def kv(
    model: Weighted,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Length of a prompt; repeat for more. [default: 1024, 2048, 4096 and 8192, as far as they fit]",
            metavar="N",
        ),
    ] = None,
    directory: OneDirectory = None,
    runs: EngineRuns = 3,
    eager: Eager = None,
    engine_arg: EngineArguments = None,
    limit_gb: LimitSize = 4.0,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Time the first token of long prompts, cold and thawed.

    One engine prefills each prompt with nothing cached, answers it from its prefix cache, and freezes that. A fresh
    engine restores the file and answers. Pages, tokens and log-probabilities of both are compared.
    """
    from ..bench import kv as measuring
    from ..bench.summary import kv_table
    from ..engines.vllm.api import require_vllm_installed

    asked = of_two_engines(model, tokens, directory, runs, eager, engine_arg, limit_gb)
    settings = measuring.Settings(**asked)
    require_vllm_installed()
    outcome = measuring.measure(settings, tell)
    shown(outcome, kv_table, range(11), record, as_json)
    require_all_of_thaw(outcome)


@app.command(epilog=examples(EXAMPLES, "fork"))
def fork(
    model: Weighted,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Length of a trunk; repeat for more. [default: 4096 and 8128, as far as they fit]",
            metavar="N",
        ),
    ] = None,
    branches: Annotated[int, typer.Option(min=2, help="Continuations of each trunk.")] = 8,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="The model's: measure a fork pool, too, whose engines share its weights."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=4, help="Engines of the pool. [default: 2]")] = None,
    directory: OneDirectory = None,
    runs: EngineRuns = 3,
    eager: Eager = None,
    engine_arg: EngineArguments = None,
    limit_gb: LimitSize = 4.0,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Time the first tokens of a trunk's continuations.

    One engine computes them at once: as requests that share nothing, with vLLM's prefix cache, and by thaw_vllm.fork.
    It keeps the trunk as a session, which a fresh engine takes up and forks. Its blocks are compared. With a snapshot,
    rounds of a fork pool are timed, too.
    """
    from ..bench import fork as measuring
    from ..bench.summary import fork_table
    from ..engines.vllm.api import require_vllm_installed
    from ..errors import UsageError

    asked = of_two_engines(model, tokens, directory, runs, eager, engine_arg, limit_gb)
    if workers is not None and snapshot is None:
        raise UsageError("--workers is of a fork pool, which is measured with --snapshot")
    settings = measuring.Settings(**asked, branches=branches, snapshot=snapshot, workers=workers or 2)
    require_vllm_installed()
    outcome = measuring.measure(settings, tell)
    shown(outcome, fork_table, range(14), record, as_json)
    require_all_of_thaw(outcome)


@app.command(epilog=examples(EXAMPLES, "swap"))
def swap(
    model: Annotated[Path, typer.Option(help="A model directory, for config and tokenizer.")],
    snapshot: Annotated[Path, typer.Option(help="The snapshot that the engine is started from.")],
    other: Annotated[Path, typer.Option(help="That of a fine-tune: other weights, all else equal.")],
    runs: Annotated[int, typer.Option(min=1, help="Swaps there and back, and times it is parked.")] = 3,
    eager: Eager = None,
    park: Annotated[bool, typer.Option("--park/--no-park", help="Park and wake it, too, on a GPU.")] = True,
    engine_arg: EngineArguments = None,
    limit_gb: LimitSize = 4.0,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Time other weights into a running engine, and an engine parked and woken.

    Seconds are from the call to the first token of a prompt of 60. From the file, and from page-locked memory; parked
    with NVIDIA's driver where it may, beside vLLM's own sleep mode. Answers are compared with those of the same weights
    before.
    """
    from ..bench import swap as measuring
    from ..bench.summary import seconds_table
    from ..engines.vllm.api import require_vllm_installed
    from ..errors import UnsupportedError
    from .freeze import parse_engine_arg

    args, limits = dict(parse_engine_arg(text) for text in engine_arg or []), limit_settings(None, limit_gb, runs, None)
    if limits.device == "cpu":
        raise UnsupportedError("weights are swapped on NVIDIA GPUs only, and torch finds none here")
    settings = measuring.Settings(model, (snapshot, other), runs, eager, park, args, limits)
    require_vllm_installed()
    outcome = measuring.measure(settings, tell)
    shown(outcome, lambda found: seconds_table(found.records), (2, 3, 4), record, as_json)


@app.command("multi-gpu", epilog=examples(EXAMPLES, "multi-gpu"))
def multi_gpu(
    directory: Directories = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="The first so many. [default: all]")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A rank's; repeat. cpu is a try without GPUs.", metavar="NAME")
    ] = None,
    size_gb: Annotated[float, typer.Option(min=0.001, help="About how large each rank's file is.")] = 8.03,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each rank.")] = 3,
    cold_runs: Annotated[int | None, typer.Option(min=1, help="The same for cold disks. [default: --runs]")] = None,
    work: Annotated[
        list[str] | None, typer.Option(help="h2d, restore, peer, tcp or broadcast; repeat. [default: all]")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model directory: vLLM's engines of so many ranks are measured, too.")
    ] = None,
    engine_arg: EngineArguments = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the files for the next run of the same size.")] = False,
    limit_gb: LimitSize = 4.0,
    threads: Threads = None,
    record: Recording = False,
    as_json: Json = False,
) -> None:
    """Restore the ranks of a set at once, each to its own GPU.

    Each rank is a fresh process with a file of its own, as in a tensor-parallel engine. One of them alone is measured
    in turn with all of them. Then weights from a process that has them, over NVLink, on one GPU and over TCP, and one
    read that goes to all GPUs. Every tensor is compared with the source.

    With a model, a set of it is frozen, and vLLM's engines of so many ranks are started from it and by vLLM's loader;
    their KV is frozen and restored.
    """
    import torch

    from ..bench import multi_gpu as measuring
    from ..bench import multi_gpu_engines as engines
    from ..engines.vllm.api import require_vllm_installed
    from ..errors import UsageError
    from .freeze import parse_engine_arg

    found = places(directory)
    try:
        devices = measuring.devices(device, gpus, torch.cuda.device_count())
    except ValueError as error:
        raise UsageError(str(error)) from None
    limits = limit_settings(devices[0], limit_gb, runs, threads)
    works = chosen(work, measuring.WORKS, "work")
    settings = measuring.Settings(devices, tuple(found), works, size_gb, runs, cold_runs or runs, keep, limits)
    args = dict(parse_engine_arg(text) for text in engine_arg or [])
    if model is None and args:
        raise UsageError("--engine-arg is of vLLM's engines, which are measured with --model")
    if model is not None:
        require_vllm_installed()
    outcome = measuring.measure(settings, tell)
    if model is not None and not outcome.interrupted:
        outcome += engines.measure(engines.Settings(model, len(devices), found[0], runs, args, limits), tell)
    shown(outcome, measuring.rows, range(1, 8), record, as_json)


@app.command(epilog=examples(EXAMPLES, "report"))
def report(
    results: Annotated[Path, typer.Option(help="The directory with the recorded lines.")] = Path("benchmarks/results"),
    output: Annotated[Path, typer.Option(help="The page; its plots go into plots/ beside it.")] = Path(
        "docs/benchmarks.md"
    ),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw them (needs matplotlib).")] = True,
    as_json: Json = False,
) -> None:
    """Make docs/benchmarks.md and its plots from what was recorded.

    The notes in it come from benchmarks-notes.md beside it.
    """
    from ..bench.report.write import report as write

    made = write(results, output, plots)
    if as_json:
        document({"page": str(made.page), "plots": [str(path) for path in made.plots], "runs": made.runs})
    else:
        print(f"{plain(str(made.page))}: {made.runs} runs, {len(made.plots)} plot files")


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
