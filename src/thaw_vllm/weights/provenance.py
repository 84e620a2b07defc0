"""Where weights came from: a checkpoint's model id, and a record cheap enough to check at every start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import FormatError, MismatchError
from ..format.document import canonical
from ..format.identity import model_id as checked_id
from ..format.limits import HASH_BLOCK
from ..transport import parallel
from ..transport.source import FileSource, read_bytes
from .checkpoint import Checkpoint, has_weights, open_checkpoint
from .digest import bytes_digest, model_id

SAMPLE = 4096
"""Bytes read of each tensor to tell a changed checkpoint from the recorded one."""
SAMPLES_WITHOUT_HEADER = 256

CACHE_VARIABLE = "THAW_CACHE_DIR"

Progress = Callable[[int, int], None]


def checkpoint_id(checkpoint: Checkpoint, *, cache: bool = True, progress: Progress | None = None) -> str:
    """The model id of a checkpoint: over its tensors' names, dtypes, shapes and bytes, or its files' for other formats.

    Reads every byte once, and then never again while the files' sizes, times and inodes stay as they are.

    Args:
        cache: remember the id (and believe a remembered one) in the user's cache directory.
        progress: called as (bytes done, bytes in all) from any thread.

    Raises:
        StorageError, ReplacedError: a file cannot be read, or changed since the checkpoint was opened.
    """
    stamp = checkpoint.stamp
    if cache and (known := cached_id(checkpoint, stamp)) is not None:
        return known
    with contextlib.ExitStack() as stack:
        sources = {name: stack.enter_context(checkpoint.open_file(name)) for name in checkpoint.files}
        spans = [(t.file, t.begin, t.end) for t in checkpoint.tensors]
        if not checkpoint.headers:
            spans = [(name, 0, source.size) for name, source in sources.items()]
        digests = _span_digests(sources, spans, progress)
    if checkpoint.headers:
        found = model_id((t.name, t.dtype, t.shape, d) for t, d in zip(checkpoint.tensors, digests, strict=True))
    else:
        entries = [[name, end, digest] for (name, _, end), digest in zip(spans, digests, strict=True)]
        found = "files-blake3:" + blake3(canonical(sorted(entries))).hexdigest()
    checkpoint.check_unchanged()
    if cache:
        _remember(checkpoint, stamp, found)
    return found


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """File sizes, header digests, samples of every tensor, and the hub commit where the path tells it.

    Goes into a snapshot's header; ``check_source`` holds a directory against it.

    Raises:
        StorageError, ReplacedError: a file cannot be read, or changed since the checkpoint was opened.
    """
    record: dict[str, Any] = {"files": [_file_record(checkpoint, name) for name in checkpoint.files]}
    commit = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", str(checkpoint.directory))
    if commit:
        record["revision"] = commit[1]
    return record


def check_source(record: dict[str, Any], model: str | None, directory: Path, name: str) -> None:
    """Refuse a model directory whose weight files are not the ones a snapshot was frozen from.

    Compared are the files' names, sizes, headers and 4 KiB of every tensor; the whole model id too when it is
    remembered from ``thaw id``. A directory without weight files passes: they are not needed to thaw.

    Args:
        record: ``source_record`` from the snapshot; may be hostile or empty.
        model: the snapshot's model id.
        directory: the engine's model directory.
        name: the snapshot's name, for messages.

    Raises:
        MismatchError: naming the file that differs.
    """
    expected = record.get("files")
    if not isinstance(expected, list) or not directory.is_dir() or not has_weights(directory):
        return
    checkpoint = open_checkpoint(directory)
    known = cached_id(checkpoint, checkpoint.stamp)
    if known is not None and model is not None and known.split(":")[0] == model.split(":")[0]:
        if known != model:
            raise MismatchError(f"{name!r} was frozen from other weights than {str(directory)!r} holds; freeze again")
        return
    found = [_file_record(checkpoint, file) for file in checkpoint.files]
    for ours, theirs in zip(found, expected, strict=False):
        if ours != theirs:
            raise MismatchError(
                f"{ours['name']!r} in {str(directory)!r} is not the file that {name!r} was frozen from (another "
                "fine-tune or revision); freeze this model again"
            )
    if len(found) != len(expected):
        raise MismatchError(
            f"{str(directory)!r} has {len(found)} weight files, {name!r} was frozen from {len(expected)}; freeze again"
        )


def cached_id(checkpoint: Checkpoint, stamp: list[list[Any]] | None = None) -> str | None:
    """The remembered model id of an unchanged checkpoint, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError, FormatError):
        remembered = json.loads(_cache_file(checkpoint).read_bytes())
        if remembered["files"] == (stamp or checkpoint.stamp):
            return checked_id(remembered["id"], "id")
    return None


def cache_directory() -> Path:
    """``$THAW_CACHE_DIR``, else ``$XDG_CACHE_HOME/thaw``, by default ``~/.cache/thaw``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thaw"


def _span_digests(
    sources: dict[str, FileSource], spans: list[tuple[str, int, int]], progress: Progress | None
) -> list[str]:
    """``bytes_digest`` of each (file, begin, end), blocks hashed by several threads."""
    total, done = sum(end - begin for _, begin, end in spans), 0
    blocks: list[list[bytes]] = [[b""] * -(-(end - begin) // HASH_BLOCK) for _, begin, end in spans]
    lock = threading.Lock()

    def work(task: tuple[int, int]) -> None:
        nonlocal done
        number, block = task
        name, begin, end = spans[number]
        start = begin + block * HASH_BLOCK
        size = min(HASH_BLOCK, end - start)
        blocks[number][block] = blake3(read_bytes(sources[name], start, size)).digest()
        with lock:
            done += size
            if progress is not None:
                progress(done, total)

    tasks = ((i, b) for i, found in enumerate(blocks) for b in range(len(found)))
    parallel.run(tasks, work, parallel.default_workers())
    for source in sources.values():
        source.check_unchanged()
    return [bytes_digest(found) for found in blocks]


def _file_record(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    header = checkpoint.headers.get(name, b"")
    samples = blake3()
    with checkpoint.open_file(name) as source:
        spans = [(t.begin, t.end) for t in checkpoint.tensors if t.file == name and t.end > t.begin]
        if not spans:
            step = max(source.size // SAMPLES_WITHOUT_HEADER, SAMPLE)
            spans = [(at, min(at + step, source.size)) for at in range(0, source.size, step)]
        for begin, end in spans:
            at = begin + max(end - begin - SAMPLE, 0) // 2
            samples.update(read_bytes(source, at, min(SAMPLE, end - at)))
        size = source.size
    return {"name": name, "size": size, "header": blake3(header).hexdigest(), "samples": samples.hexdigest()}


def _cache_file(checkpoint: Checkpoint) -> Path:
    name = blake3(os.fsencode(checkpoint.directory)).hexdigest()[:32]
    return cache_directory() / "ids" / f"{name}.json"


def _remember(checkpoint: Checkpoint, stamp: list[list[Any]], found: str) -> None:
    # A home that is read-only, full or unknown (RuntimeError) costs speed, not correctness.
    with contextlib.suppress(OSError, RuntimeError):
        path = _cache_file(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged = path.with_suffix(f".{os.getpid()}.part")
        try:
            staged.write_text(json.dumps({"directory": str(checkpoint.directory), "files": stamp, "id": found}))
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
