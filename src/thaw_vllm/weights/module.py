"""Freezing and restoring any ``torch.nn.Module``: the public functions, all over one implementation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import __version__
from ..errors import MismatchError
from ..format.header import Header
from ..format.identity import Identity
from ..format.snapshot import Snapshot
from ..transport.collector import collection_paused
from ..transport.source import FileSource, Source
from . import ahead
from .capture import capture, fillable, module_tensors, persistent_buffers
from .freeze import FreezeOptions, FreezeReport, tensors_id, write_snapshot
from .open import open_memory, sections
from .reading import RestoreOptions, reading
from .restore import RestoreReport, restore

WRITER = f"thaw {__version__}"


def freeze_model(model: torch.nn.Module, path: str | os.PathLike[str], **options: Any) -> FreezeReport:
    """Write a module's parameters and persistent buffers to one ``.thaw`` file.

    Args:
        model: on any device; must not change until this returns.
        path: the file; it appears whole or not at all.
        options: fields of FreezeOptions (``force``, ``mode``, ``chunk_size``, ``compress``, ``workers``, ``progress``).

    Returns:
        Bytes, ids and seconds by phase.

    Raises:
        UnsupportedError: a tensor that cannot be stored exactly.
        ExistsError, SpaceError, StorageError: nothing was written; what was there before is untouched.

    Notes:
        Device memory is copied a chunk at a time while other chunks are hashed and written, so there is nothing for a
        separate pipelined variant to add; ``freeze_model_pipelined`` is this function.
    """
    captured = capture(module_tensors(model))
    header = Header(identity=Identity(stage="module", architecture=type(model).__name__), writer=WRITER)
    return write_snapshot(path, header, captured, FreezeOptions(**options), identify=tensors_id)


freeze_model_pipelined = freeze_model


def restore_model(model: torch.nn.Module, path: str | os.PathLike[str], **options: Any) -> RestoreReport:
    """Fill a module from a ``.thaw`` file, in place, bit for bit.

    Args:
        model: the module it was frozen from, or one of the same names, shapes, dtypes and ties, on any device.
        path: the file.
        options: fields of RestoreOptions (``verify``, ``route``, ``workers``, ``processes``, ``progress``).

    Raises:
        MismatchError: the file is for another module; nothing was copied.
        FormatError, CorruptionError, StorageError, DeviceError: the file is unsound, or a device failed. When a
            checksum fails the module is partly filled and must not be used.

    Notes:
        The library picks the route and the report says which, and why. Host tensors are read into directly. To a GPU,
        threads or helper processes read into page-locked slots that are copied from, whatever is cached from memory
        and the rest directly from the disk; each chunk is verified on the GPU after it arrived.
    """
    start = time.perf_counter()
    with collection_paused(), FileSource(path) as source:
        return restore_opened(model, source, RestoreOptions(**options), start)


def restore_model_pipelined(model: torch.nn.Module, path: str | os.PathLike[str], **options: Any) -> RestoreReport:
    """``restore_model`` by the disk's route: direct I/O past the page cache, where the file system has it.

    For files that were not read lately and will not be soon: nothing else is pushed out of memory. On tmpfs, and where
    direct I/O is refused, it is ``restore_model``, and the report says so.
    """
    return restore_model(model, path, **{"route": "direct", **options})


def restore_model_from_ram(
    model: torch.nn.Module, snapshot: str | os.PathLike[str] | bytes | bytearray | memoryview, **options: Any
) -> RestoreReport:
    """``restore_model`` from a snapshot in memory: a bytes-like object (mmap, shared memory), or a path on tmpfs."""
    if isinstance(snapshot, (str, os.PathLike)):
        return restore_model(model, snapshot, **options)
    start = time.perf_counter()
    with collection_paused(), open_memory(snapshot) as opened:
        return restore_opened(model, opened.source, RestoreOptions(**options), start, opened.snapshot)


def restore_opened(
    model: torch.nn.Module,
    source: Source,
    options: RestoreOptions,
    start: float,
    snapshot: Snapshot | None = None,
    landed: Callable[[int], None] | None = None,
) -> RestoreReport:
    """``restore_model`` from an open source, whose sections may have been read already.

    Args:
        start: when the clock began (``time.perf_counter``).
        landed: as of ``restore``.
    """
    targets, parameters = fillable(model)
    kept = ahead.ready(targets.values()) if options.processes and options.workers is None else None
    with reading(source, targets.values(), options, kept) as way:
        snapshot = snapshot or sections(source)
        require_module(snapshot, source.name)
        required = parameters | persistent_buffers(model)
        opened = time.perf_counter() - start - way.seconds
        report = restore(source, snapshot, targets, required, options, way, landed=landed)
    seconds = {"choose": report.seconds["choose"], "open": opened} | report.seconds
    return replace(report, seconds=seconds | {"total": time.perf_counter() - start})


def require_module(snapshot: Snapshot, name: str) -> None:
    """Refuse what is no module's weights.

    Raises:
        MismatchError: it is KV blocks, or a stage that only an engine can thaw.
    """
    if snapshot.header.kv is not None:
        raise MismatchError(f"{name!r} holds KV blocks, not weights; an engine that runs with their weights thaws them")
    stage = snapshot.header.identity.stage
    if stage not in ("module", "checkpoint"):
        raise MismatchError(
            f"{name!r} holds the {stage!r} stage of {snapshot.header.identity.engine}; only that engine "
            "can thaw it (load_format='thaw')"
        )
