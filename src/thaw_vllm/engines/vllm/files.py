"""The config and tokenizer that a snapshot carries, laid out as a model directory for the engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from blake3 import blake3

from ...errors import UsageError
from ...format.document import canonical
from ...weights.checkpoint import CARRIED_FILES
from ...weights.open import open_snapshot
from ...weights.provenance import cache_directory
from ...weights.read_storage import filled


def carried_directory(path: str | os.PathLike[str]) -> Path:
    """A directory with the snapshot's carried files, named by their content, under the cache directory.

    An existing one is used only when it holds exactly these bytes; otherwise it is made anew.

    Raises:
        UsageError: the snapshot carries no config.
        CorruptionError: a carried file's checksum does not agree.
    """
    with open_snapshot(path) as opened:
        files = {
            f.name: filled(opened.snapshot, opened.source, f.storage)
            for f in opened.snapshot.index.files
            if f.name in CARRIED_FILES
        }
    if "config.json" not in files:
        raise UsageError(f"{os.fspath(path)!r} carries no config.json; name the model directory too")
    name = blake3(canonical([[n, blake3(data).hexdigest()] for n, data in sorted(files.items())])).hexdigest()[:32]
    target = cache_directory() / "models" / name
    if _holds(target, files):
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        for base, data in files.items():
            (staged / base).write_bytes(data)
        if target.exists():
            shutil.rmtree(target)
        os.rename(staged, target)
    except OSError:
        if not _holds(target, files):  # else another process was faster
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _holds(directory: Path, files: dict[str, bytes]) -> bool:
    try:
        found = {p.name: p.read_bytes() for p in directory.iterdir()}
    except OSError:
        return False
    return found == files
