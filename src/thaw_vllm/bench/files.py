"""One model in the files of every system, made once and read by all runs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpaceError
from ..transport import parallel
from .systems import COMPRESSED, NATIVE, SAFETENSORS, THAW

if TYPE_CHECKING:
    import torch

    from .child import Steps
    from .llama import Shape

MANIFEST = "manifest.json"
SHARD = 5 * 10**9
"""Bytes of one safetensors file, as transformers splits them: four for Llama 3 8B."""
PIECE = 16 << 20
NAMES = {THAW: "model.thaw", COMPRESSED: "model-compressed.thaw", NATIVE: "model.native"}


@dataclass(frozen=True)
class Files:
    """A folder of ``make``.

    Attributes:
        folder: where they are.
        bytes: of the model.
        digests: of every tensor, by name.
        paths: by layout (SAFETENSORS, THAW, NATIVE); one that could not be made is missing.
        missing: layout → why.
        made: seconds it took, by layout; not a measurement, only to know where the time went.
    """

    folder: Path
    bytes: int
    digests: dict[str, str]
    paths: dict[str, list[Path]]
    missing: dict[str, str]
    made: dict[str, float]


def opened(folder: Path, shape: Shape, layouts: Sequence[str]) -> Files | None:
    """What an earlier run left in ``folder``; None unless it is whole, of this shape and in these layouts."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        paths = {name: [folder / file for file in files] for name, files in found["paths"].items()}
        same = found["shape"] == asdict(shape) and set(layouts) <= {*paths, *found["missing"]}
        if not same or not all(path.is_file() for files in paths.values() for path in files):
            return None
        return Files(folder, found["bytes"], found["digests"], paths, found["missing"], found["made"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_room(directory: Path, needed: int, cure: str) -> None:
    """
    Raises:
        SpaceError: less than ``needed`` bytes are free there.
    """
    free = os.statvfs(directory)
    if free.f_bavail * free.f_frsize < needed:
        have = free.f_bavail * free.f_frsize / 1e6
        raise SpaceError(
            f"{str(directory)!r} has {have:,.0f} MB free and needs {needed / 1e6:,.0f} MB for this; {cure}"
        )


def make(request: dict[str, Any]) -> Steps:
    """The child's task: ``shape``, ``device``, ``folder`` (made anew), ``layouts``."""
    import time

    from . import llama
    from .device import opened as device_opened
    from .digest import digests
    from .rivals import system

    device, folder = device_opened(request["device"]), Path(request["folder"])
    native = system("thaw-native")
    layouts: list[str] = request["layouts"]
    missing: dict[str, str] = {}
    if NATIVE in layouts:
        try:
            native.prepare(device)
        except ImportError as error:
            missing[NATIVE] = f"{type(error).__name__}: {error}"
    yield
    shape = llama.Shape(**request["shape"])
    model = llama.random(shape, device)
    found = digests(model.tensors)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield
    paths: dict[str, list[str]] = {}
    made: dict[str, float] = {}
    for layout in layouts:
        if layout in missing:
            continue
        start = time.perf_counter()
        try:
            if layout == SAFETENSORS:
                paths[layout] = write_safetensors(model.tensors, folder)
            else:
                (native if layout == NATIVE else system(layout)).freeze(model, folder / NAMES[layout])
                paths[layout] = [NAMES[layout]]
        except Exception as error:  # a rival that cannot write is a line in the table, not the end
            if layout == SAFETENSORS:
                raise
            missing[layout] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        made[layout] = round(time.perf_counter() - start, 2)
    yield
    manifest = {"shape": asdict(shape), "bytes": shape.bytes, "digests": found, "paths": paths}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"missing": missing, "made": made}))
    return {}


TASKS = {"make": make}


def shards(sizes: dict[str, int], limit: int = SHARD) -> list[list[str]]:
    """Names by file, in order, at most ``limit`` bytes a file or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Write bfloat16 tensors as shards, all of them at once by many threads; returns the files' names.

    Not ``save_file``: that copies and writes with one thread, and takes longer than all runs together.
    """
    groups = shards({name: tensor.nbytes for name, tensor in tensors.items()})
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    files = [os.open(folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600) for name in names]
    try:
        pieces: list[Iterator[tuple[int, int, torch.Tensor]]] = []
        for file, group in zip(files, groups, strict=True):
            head, base = _header({name: tensors[name] for name in group})
            os.pwrite(file, head, 0)
            pieces.append(_pieces(file, base, [tensors[name] for name in group]))
        parallel.run(_in_turn(pieces), _write, parallel.default_workers())
        for file in files:
            os.fsync(file)
    finally:
        for file in files:
            os.close(file)
    return names


def _header(tensors: dict[str, torch.Tensor]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)


def _pieces(file: int, at: int, tensors: list[torch.Tensor]) -> Iterator[tuple[int, int, torch.Tensor]]:
    import torch

    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        for low in range(0, flat.numel(), PIECE):
            part = flat[low : low + PIECE]
            yield file, at, part
            at += part.numel()


def _in_turn(iterators: list[Iterator[tuple[int, int, torch.Tensor]]]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """One of each after the other: the kernel lets one thread at a time write to a file."""
    while iterators:
        left = []
        for iterator in iterators:
            for item in iterator:
                yield item
                left.append(iterator)
                break
        iterators = left


def _write(piece: tuple[int, int, torch.Tensor]) -> None:
    file, at, part = piece
    array: Any = part.cpu().numpy()
    data = memoryview(array)
    while data:
        count = os.pwrite(file, data, at)
        at, data = at + count, data[count:]
