"""Restoring into host memory against safetensors and plain reads; verifying against plain reads.

Everything runs in one process, in alternation, into the same tensors: whatever else the machine does at the time meets
all of them, and a ratio is taken round by round.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from ..errors import MissingDependencyError, SpaceError
from ..format.limits import ALIGNMENT
from ..transport import parallel
from ..transport.read import step_size
from ..transport.source import FileSource
from ..weights.layout import byte_view, host_bytes
from ..weights.module import freeze_model, restore_model
from ..weights.verify import verify
from .record import Record

SHAPES = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336), (4096,))
"""Weights of one Llama-3-8B layer; bfloat16."""

PLAIN, VERIFIED, RIVAL, LIMIT = "thaw, unverified", "thaw, verified", "safetensors", "plain reads"
VERIFY, READING = "thaw verify", "plain reads, kept nowhere"
TASK = 16 << 20
"""Bytes that one thread of the plain reads takes at a time, as large as a chunk."""


@dataclass(frozen=True)
class Comparison:
    """What one directory gave.

    Attributes:
        directory: where the files were.
        records: by name.
        ratios: (ours, theirs) → our speed over theirs, one a round.
    """

    directory: str
    records: dict[str, Record]
    ratios: dict[tuple[str, str], list[float]]

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """Median, lowest and highest of the rounds."""
        found = self.ratios[ours, theirs]
        return statistics.median(found), min(found), max(found)


COMPARED = ((PLAIN, RIVAL), (VERIFIED, RIVAL), (PLAIN, LIMIT), (VERIFIED, LIMIT), (VERIFY, READING))


def compare(directory: Path, size: int, rounds: int, workers: int | None = None) -> Comparison:
    """Measure in ``directory``; makes files of twice ``size`` there and removes them.

    Args:
        directory: on the file system to be measured.
        size: bytes of the model, made of SHAPES, at least one tensor.
        rounds: how often each is measured, after one round that is not counted and in which the bytes are compared.
        workers: threads of ours and of the plain reads; None for thaw's default.

    Raises:
        MissingDependencyError: safetensors is not installed.
        SpaceError: not enough room.
        AssertionError: something restored other bytes.
    """
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        raise MissingDependencyError("the comparison needs safetensors: pip install safetensors") from None
    threads = workers or parallel.default_workers()
    free = os.statvfs(directory)
    if free.f_bavail * free.f_frsize < 2.1 * size:
        raise SpaceError(f"{str(directory)!r} needs {2.1 * size / 1e9:.1f} GB free for this; give --size-mb or --dir")
    model = _model(size)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    wanted = _digests(model)
    with tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=directory) as folder:
        ours, theirs = os.path.join(folder, "model.thaw"), os.path.join(folder, "model.safetensors")
        freeze_model(model, ours)
        save_file(dict(model.state_dict()), theirs)
        runs: dict[str, Callable[[], object]] = {
            PLAIN: lambda: restore_model(model, ours, verify=False, workers=threads),
            VERIFIED: lambda: restore_model(model, ours, workers=threads),
            RIVAL: lambda: model.load_state_dict(load_file(theirs)),
            LIMIT: lambda: _plain_reads(ours, threads, model),
            VERIFY: lambda: verify(ours, workers=threads),
            READING: lambda: _plain_reads(ours, threads, None),
        }
        peaks = {}
        for name, run in runs.items():
            if name in (PLAIN, VERIFIED, RIVAL):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
            with _peak() as peak:
                run()
            peaks[name] = peak[0]
            if name in (PLAIN, VERIFIED, RIVAL) and _digests(model) != wanted:
                raise AssertionError(f"{name} restored other bytes")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        file_size = os.path.getsize(ours)
    place = "tmpfs" if str(directory.resolve()).startswith("/dev/shm") else "pagecache"
    routes = {
        PLAIN: ("restore-cpu", "thaw", place, False, True),
        VERIFIED: ("restore-cpu", "thaw", place, True, True),
        RIVAL: ("restore-cpu", "safetensors", f"{place}-load_file", False, True),
        LIMIT: ("restore-cpu", "limit", f"{place}-preadv", False, None),
        VERIFY: ("verify", "thaw", place, True, None),
        READING: ("verify", "limit", f"{place}-preadv", False, None),
    }
    records = {
        name: Record(
            work,
            system,
            route,
            file_size if work == "verify" else size,
            seconds[name],
            "warm",
            verified,
            equal,
            peaks[name],
            {"threads": torch.get_num_threads() if name == RIVAL else threads},
        )
        for name, (work, system, route, verified, equal) in routes.items()
    }
    ratios = {(a, b): [theirs / ours for ours, theirs in zip(seconds[a], seconds[b], strict=True)] for a, b in COMPARED}
    return Comparison(str(directory), records, ratios)


def _model(size: int) -> torch.nn.Module:
    """Random bits in tensors of SHAPES, about ``size`` bytes in all."""
    layers = torch.nn.ModuleList()
    made = 0
    while not made or made < size:
        layer = torch.nn.ParameterList()
        for shape in SHAPES:
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            tensor.view(torch.int16).random_()
            layer.append(torch.nn.Parameter(tensor, requires_grad=False))
            made += tensor.numel() * tensor.element_size()
            if made >= size:
                break
        layers.append(layer)
    return layers


def _digests(model: torch.nn.Module) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(host_bytes(byte_view(p.detach()))) for p in model.parameters()]


def _plain_reads(path: str, threads: int, model: torch.nn.Module | None) -> None:
    """``preadv`` of the whole file by ``threads`` threads, into the tensors' memory or a step of a thread's own."""
    views: Sequence[memoryview] = [host_bytes(byte_view(p.detach())) for p in model.parameters()] if model else ()
    local, step = threading.local(), step_size(threads)
    with FileSource(path) as source:

        def fill(task: tuple[int, memoryview]) -> None:
            source.read_into(*task)

        def skim(begin: int) -> None:
            held: memoryview | None = getattr(local, "held", None)
            if held is None:
                held = local.held = memoryview(bytearray(step))
            for at in range(begin, min(begin + TASK, source.size), step):
                source.read_into(at, held[: min(step, source.size - at)])

        if model is None:
            parallel.run(range(0, source.size, TASK), skim, threads)
        else:
            parallel.run(_tasks(views, ALIGNMENT), fill, threads)


def _tasks(views: Sequence[memoryview], offset: int) -> Iterator[tuple[int, memoryview]]:
    """Offsets and destinations, from an aligned ``offset``; which bytes land where does not matter to a limit."""
    for view in views:
        for at in range(0, len(view), TASK):
            part = view[at : at + TASK]
            yield offset, part
            offset += len(part)


@contextlib.contextmanager
def _peak() -> Iterator[list[float | None]]:
    """Gives a list whose entry is, afterwards, the most anonymous memory in MiB beyond what was there before."""
    found: list[float | None] = [None]
    before = _anonymous()
    if before is None:
        yield found
        return
    stop, highest = threading.Event(), before

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, _anonymous() or 0)

    thread = threading.Thread(target=watch, name="thaw-bench-memory", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found[0] = round((max(highest, _anonymous() or 0) - before) / 1024, 1)


def _anonymous() -> int | None:
    """Resident anonymous memory of this process in KiB; page cache and shared memory are not in it."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return None
