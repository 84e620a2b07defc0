"""A file of caches, written."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, StorageError, UsageError
from ..format.document import canonical
from ..transport.writer import StagedFile
from .archive import (
    MANIFEST,
    MAX_BYTES,
    MAX_FILE,
    MAX_MANIFEST,
    MAX_MEMBER,
    MAX_MEMBERS,
    VERSION,
    Manifest,
    Member,
    Whole,
    parse,
)
from .groups import relative
from .places import carried, is_path

_MADE = (1980, 1, 1, 0, 0, 0)
"""When each member says it was made, so that the same caches are the same file."""


@dataclass(frozen=True)
class Written:
    """A file of caches that was written.

    Attributes:
        sha256: of the bytes that were written, whatever has become of the file.
        size: of these.
    """

    manifest: Manifest
    sha256: str
    size: int


def pack(
    path: str | os.PathLike[str],
    files: Iterable[tuple[str, Path]],
    key: Mapping[str, str],
    made: Mapping[str, Any],
    *,
    force: bool = False,
) -> Written:
    """Write a file of caches.

    Args:
        files: paths in it, each with where the file lies.
        force: replace an existing file.

    Raises:
        UsageError: there is nothing to pack, or too much.
        ExistsError, SpaceError, StorageError: as for any file; nothing was published.
    """
    files = list(files)
    if wrong := [name for name, _ in files if not is_path(name) or not carried(name)]:
        raise UsageError(f"{wrong[0]!r} cannot be packed: it is no path in a cache, or nothing that travels")
    contents = {name: relative(name, _read(source), source.parent) for name, source in files}
    if not contents:
        raise UsageError("there is nothing to pack: nothing was compiled")
    sizes = [len(data) for data in contents.values()]
    if len(sizes) > MAX_MEMBERS or max(sizes) > MAX_MEMBER or sum(sizes) > min(MAX_BYTES, MAX_FILE):
        raise UsageError(f"{len(sizes)} files of {sum(sizes)} bytes are too many, or too large, for one file of caches")
    members = tuple(
        Member(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(contents.items())
    )
    manifest = Manifest(dict(key), dict(made), members)
    try:
        told = canonical(_told(manifest))
    except ValueError as error:
        raise UsageError(f"this cannot be packed: {error}") from None
    if len(told) > MAX_MANIFEST:
        raise UsageError(f"the names of {len(sizes)} files are too long for one file of caches")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, allowZip64=False, compresslevel=1) as archive:
        archive.writestr(_info(MANIFEST), told)
        for member in members:
            archive.writestr(_info(member.path), contents[member.path])
    data = whole.getvalue()
    written = Whole(repr(os.fspath(path)), data, hashlib.sha256(data).hexdigest())
    try:
        parse(written)  # what is published can be read
    except FormatError as error:
        raise UsageError(f"this cannot be packed: {error}") from None
    with StagedFile(path, len(data), force=force) as staged:
        staged.write(0, data)
        staged.publish()
    return Written(manifest, written.sha256, len(data))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None


def _info(name: str) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name, _MADE)
    found.compress_type = zipfile.ZIP_DEFLATED
    found.create_system = 3
    found.external_attr = (stat.S_IFREG | 0o600) << 16
    return found


def _told(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": "thaw caches",
        "version": VERSION,
        "key": manifest.key,
        "made": manifest.made,
        "files": [[member.path, member.size, member.sha256] for member in manifest.members],
    }
