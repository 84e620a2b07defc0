"""safetensors checkpoint directories to snapshots and back, every tensor bit-equal, without an accelerator."""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import MismatchError, UnsupportedError, UsageError
from ..format.chunks import Chunk
from ..format.document import mapping, parse
from ..format.dtypes import ITEM_SIZE
from ..format.header import Header
from ..format.identity import Identity
from ..format.index import TENSOR, File, Index, Tensor
from ..transport import parallel
from ..transport.read import Piece, piece_of, read
from ..transport.source import FileSource, Source
from ..transport.writer import StagedFile, check_target
from .capture import Captured, HeldBytes, Storage
from .checkpoint import (
    CARRIED_FILES,
    INDEX,
    Checkpoint,
    carried_files,
    config_hash,
    open_checkpoint,
    read_config,
)
from .digest import bytes_digest, model_id
from .freeze import FreezeOptions, FreezeReport, write_snapshot
from .layout import byte_view, host_bytes, runs
from .open import Opened, open_snapshot
from .provenance import source_record
from .read_storage import filled
from .safetensors_layout import SAFETENSORS_NAMES, SHARD, header, index_document, shards
from .staged_directory import StagedDirectory, check_directory

CONVERTED = ("module", "checkpoint")
"""Stages whose tensors carry the names of a checkpoint."""

METADATA = "safetensors."
"""Prefix under which a snapshot keeps the ``__metadata__`` of the safetensors files."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that carry a dtype's bits unchanged while strides are undone."""
_BLOCK = 16 << 20


class FileBytes:
    """A storage that lies in a file; read when it is asked for, into one buffer a thread that all storages share."""

    def __init__(self, source: Source, begin: int, length: int, buffers: threading.local) -> None:
        self._source, self._begin, self._buffers = source, begin, buffers
        self.length = length

    def read(self, at: int, length: int) -> memoryview:
        """``length`` bytes from ``at``, good until this thread reads again."""
        held: bytearray | None = getattr(self._buffers, "held", None)
        if held is None or len(held) < length:
            held = self._buffers.held = bytearray(length)
        view = memoryview(held)[:length]
        self._source.read_into(self._begin + at, view)
        return view

    def run(self, at: int, length: int) -> None:
        """They are in no device's memory."""


@dataclass(frozen=True)
class CheckpointReport:
    """What ``to_checkpoint`` wrote.

    Attributes:
        directory: the published directory.
        files: safetensors files, in order.
        carried: config and tokenizer files beside them.
        bytes: of all tensors.
        tensors: names written.
        repeated: names of tensors that share memory in the snapshot and were written on their own here, because
            safetensors has no ties.
        model: the snapshot's model id, when it has one.
        seconds: everything counted.
    """

    directory: str
    files: tuple[str, ...]
    carried: tuple[str, ...]
    bytes: int
    tensors: int
    repeated: tuple[str, ...]
    model: str | None
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes of tensors a second."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)


def from_checkpoint(directory: str | os.PathLike[str], target: str | os.PathLike[str], **options: Any) -> FreezeReport:
    """Write a safetensors checkpoint as a snapshot of stage ``checkpoint``: its tensors under their own names.

    Args:
        directory: with ``*.safetensors``, and the config and tokenizer files to carry.
        target: the ``.thaw`` file; it appears whole or not at all.
        options: fields of FreezeOptions.

    Raises:
        UsageError, FormatError: not a sound checkpoint directory.
        UnsupportedError: weights in a format other than safetensors.
        ExistsError, SpaceError, StorageError, ReplacedError: nothing was written.

    Notes:
        Every byte is read once; memory is one chunk a thread. The model id comes from the same pass.
    """
    parsed = FreezeOptions(**options)
    check_target(Path(target), parsed.force)
    checkpoint = open_checkpoint(directory)
    place = Path(os.path.realpath(target))
    if place.parent == checkpoint.directory and (place.name in checkpoint.files or _of_checkpoint(place.name)):
        raise UsageError(f"{os.fspath(target)!r} is a file of the checkpoint itself; choose another name")
    if not checkpoint.headers:
        raise UnsupportedError(
            f"{os.fspath(directory)!r} holds {checkpoint.files[0]!r}; only safetensors can be converted without "
            "running an engine. Load it with transformers and save_pretrained() it first, or use thaw freeze"
        )
    with contextlib.ExitStack() as stack:
        # Before anything else is read, so that one version of each file gives its samples and its tensors.
        sources = {name: stack.enter_context(checkpoint.open_file(name)) for name in checkpoint.files}
        front = Header(
            identity=_identity(read_config(checkpoint.directory)),
            writer=f"thaw {__version__}",
            source=source_record(checkpoint),
            metadata=_metadata(checkpoint),
        )
        captured = _captured(checkpoint, sources)

        def identify(_: Captured, digests: list[str]) -> str:
            checkpoint.check_unchanged()
            return model_id(
                (t.name, t.dtype, t.shape, bytes_digest([]) if t.storage is None else digests[t.storage])
                for t in captured.index.tensors
            )

        return write_snapshot(target, front, captured, parsed, identify)


def to_checkpoint(
    snapshot: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    force: bool = False,
    shard_size: int = SHARD,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """Write a snapshot as a checkpoint directory: ``model.safetensors`` (or shards and their index), carried files.

    Args:
        snapshot: a file of stage ``module`` or ``checkpoint``.
        directory: must not exist, or be empty; it appears whole or not at all.
        force: replace a directory that holds nothing but a checkpoint.
        shard_size: bytes of tensors in one file, unless a single tensor is larger.
        workers: threads; None for what the machine bears.
        progress: called as (bytes done, bytes in all) from any thread.

    Raises:
        MismatchError: the file holds KV blocks.
        UnsupportedError: an engine's raw stage, or a dtype or name that safetensors cannot hold.
        FormatError, CorruptionError: the snapshot is unsound. ExistsError, SpaceError, StorageError: see
            StagedDirectory. Nothing was written.

    Notes:
        Memory is one chunk a thread, and in addition one whole tensor where a snapshot keeps its elements in another
        order than row-major (a transposed or channels-last parameter).
    """
    start = time.perf_counter()
    if shard_size < 1:
        raise UsageError(f"shard_size must be at least 1, not {shard_size}")
    check_directory(directory, force, _of_checkpoint)
    with open_snapshot(snapshot) as opened:
        _refuse(opened)
        index = opened.snapshot.index
        files = shards(index.tensors, shard_size)
        total = sum(tensor.bytes for tensor in index.tensors)
        small = {f.name: filled(opened.snapshot, opened.source, f.storage) for f in index.files}
        if len(files) > 1:
            small[INDEX] = index_document(files, total)
        metadata = {"format": "pt"} | {
            key.removeprefix(METADATA): value
            for key, value in opened.snapshot.header.metadata.items()
            if key.startswith(METADATA)
        }
        headers = {name: header(name, tensors, metadata) for name, tensors in files.items()}
        size = total + sum(map(len, headers.values())) + sum(map(len, small.values()))
        with StagedDirectory(directory, size, force=force, ours=_of_checkpoint) as staged:
            places: dict[str, tuple[StagedFile, int]] = {}
            for name, tensors in files.items():
                head = headers[name]
                file = staged.file(name, len(head) + sum(t.bytes for t in tensors))
                file.write(0, head)
                at = len(head)
                for tensor in tensors:
                    places[tensor.name] = file, at
                    at += tensor.bytes
            _write_tensors(opened, places, workers or parallel.default_workers(), _Meter(total, progress))
            for name, data in small.items():
                staged.file(name, len(data)).write(0, data)
            opened.source.check_unchanged()
            staged.publish()
        return CheckpointReport(
            str(staged.target),
            tuple(files),
            tuple(name for name in small if name != INDEX),
            total,
            len(index.tensors),
            tuple(name for others in index.ties.values() for name in others),
            opened.snapshot.header.identity.model,
            time.perf_counter() - start,
        )


def _identity(config: dict[str, Any]) -> Identity:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    architectures = config.get("architectures")
    dtype = next((d for c in (config, inner) for d in (c.get("dtype"), c.get("torch_dtype")) if d), None)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return Identity(
        stage="checkpoint",
        architecture=_text(architectures[0] if isinstance(architectures, list) and architectures else None),
        config=config_hash(config) if config else None,
        dtype=_text(dtype.removeprefix("torch.") if isinstance(dtype, str) else None),
        quantization=_text(method),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 256 else None


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Free text of the safetensors files; what quantisers note there is kept for the way back."""
    found = {"model": os.fsencode(checkpoint.directory.name).decode(errors="backslashreplace")}
    for name, raw in checkpoint.headers.items():
        notes = mapping(parse(raw, f"safetensors header of {name!r}").get("__metadata__", {}), "__metadata__")
        for key, value in notes.items():
            if isinstance(value, str) and len(key) <= 200 and key.isprintable():
                found.setdefault(METADATA + key, value)
    return found


def _captured(checkpoint: Checkpoint, sources: dict[str, FileSource]) -> Captured:
    buffers = threading.local()
    storages: list[Storage] = []
    tensors: list[Tensor] = []
    for stored in checkpoint.tensors:
        number = len(storages) if stored.end > stored.begin else None
        if number is not None:
            storages.append(FileBytes(sources[stored.file], stored.begin, stored.end - stored.begin, buffers))
        tensors.append(Tensor(stored.name, TENSOR, stored.dtype, stored.shape, _row_major(stored.shape), number))
    files: list[File] = []
    for name, data in carried_files(checkpoint.directory):
        files.append(File(name, len(storages) if data else None))
        if data:
            storages.append(HeldBytes(data))
    index = Index(tuple(tensors), tuple(s.length for s in storages), tuple(files))
    return Captured(index, tuple(storages), ())


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _is_row_major(tensor: Tensor) -> bool:
    wanted = _row_major(tensor.shape)
    return all(a == b for a, b, size in zip(tensor.stride, wanted, tensor.shape, strict=True) if size > 1)


def _refuse(opened: Opened) -> None:
    """MismatchError for KV blocks, UnsupportedError for what else a checkpoint directory cannot hold."""
    name, header = opened.source.name, opened.snapshot.header
    if header.kv is not None:
        raise MismatchError(
            f"{name!r} holds KV blocks, not weights, and there is no other format for them; an engine with the same "
            "weights thaws them"
        )
    if header.identity.stage not in CONVERTED:
        raise UnsupportedError(
            f"{name!r} holds the {header.identity.stage!r} stage of {header.identity.engine}: its parameters are "
            "fused and sharded for that engine and have no names in a checkpoint. Convert the checkpoint it was "
            "frozen from instead; thaw info names it"
        )
    for tensor in opened.snapshot.index.tensors:
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise UnsupportedError(
                f"{name!r} holds {tensor.name!r} as {tensor.dtype}, which safetensors has no name for; keep it as a "
                ".thaw file, or freeze it again in another dtype"
            )
        if tensor.name == "__metadata__":
            raise UnsupportedError(f"{name!r} holds a tensor named '__metadata__', which safetensors reserves")
    for file in opened.snapshot.index.files:
        if file.name not in CARRIED_FILES:
            raise UnsupportedError(f"{name!r} carries {file.name!r}, which does not belong in a checkpoint directory")


def _of_checkpoint(name: str) -> bool:
    return name in CARRIED_FILES or name == INDEX or name.endswith(".safetensors")


class _Meter:
    """Bytes written so far, counted from any thread."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress, self._done, self._lock = total, progress, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _write_tensors(opened: Opened, places: dict[str, tuple[StagedFile, int]], workers: int, meter: _Meter) -> None:
    """Copy every tensor to its place: as it lies where that is row-major, element by element where it is not."""
    snapshot = opened.snapshot
    starts = [(chunk.storage, chunk.at) for chunk in snapshot.chunks]
    copies: list[list[tuple[int, int, StagedFile, int]]] = [[] for _ in snapshot.chunks]
    strided: list[Tensor] = []
    for tensor in snapshot.index.tensors:
        if tensor.storage is None:
            continue
        if not _is_row_major(tensor):
            strided.append(tensor)
            continue
        file, place = places[tensor.name]
        begin, end = tensor.offset, tensor.offset + tensor.bytes
        number = bisect.bisect_right(starts, (tensor.storage, begin)) - 1
        while number < len(starts) and starts[number][0] == tensor.storage and starts[number][1] < end:
            chunk = snapshot.chunks[number]
            low, high = max(begin, chunk.at), min(end, chunk.at + chunk.length)
            copies[number].append((low - chunk.at, high - chunk.at, file, place + low - begin))
            number += 1

    def copying(parts: list[tuple[int, int, StagedFile, int]]) -> Callable[[memoryview], None]:
        def deliver(data: memoryview) -> None:
            for low, high, file, place in parts:
                file.write(place, data[low:high])
                meter.add(high - low)

        return deliver

    names = {t.storage: repr(t.name) for t in reversed(snapshot.index.tensors) if t.storage is not None}
    base = snapshot.preamble.payload_at

    def piece(chunk: Chunk, **where: Any) -> Piece:
        return piece_of(chunk, base, names[chunk.storage], **where)

    pieces = (piece(c, deliver=copying(parts)) for c, parts in zip(snapshot.chunks, copies, strict=True) if parts)
    read(opened.source, pieces, workers=workers)
    for tensor in strided:
        data = bytearray(snapshot.index.storages[tensor.storage or 0])
        view = memoryview(data)
        chunks = [c for c in snapshot.chunks if c.storage == tensor.storage]
        read(opened.source, [piece(c, into=view[c.at : c.at + c.length]) for c in chunks], workers=workers)
        file, place = places[tensor.name]
        for block in _row_major_blocks(tensor, data):
            file.write(place, block)
            place += len(block)
            meter.add(len(block))


def _row_major_blocks(tensor: Tensor, data: bytearray) -> Iterator[memoryview]:
    """The elements of a strided view of ``data`` in row-major order, at most _BLOCK bytes at a time."""
    item = ITEM_SIZE[tensor.dtype]
    words = torch.frombuffer(data, dtype=_WORDS[item], count=tensor.extent // item, offset=tensor.offset)
    seen = words.as_strided(tensor.shape, tensor.stride)
    for start in range(0, tensor.elements, _BLOCK // item):
        stop = min(start + _BLOCK // item, tensor.elements)
        packed = torch.cat([part.reshape(-1) for part in runs(seen, start, stop)])
        yield host_bytes(byte_view(packed))
