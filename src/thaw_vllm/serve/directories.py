"""Directories in which requests may name models and snapshots, and nothing outside of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import StorageError, ThawError, UsageError
from ..weights.open import open_snapshot

MOST = 1000
"""Snapshots that are listed."""


class PathError(UsageError):
    """A path that requests may not name."""


class Directories:
    """What the operator allows.

    Attributes:
        roots: absolute, links resolved.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]]) -> None:
        """Raises:
        StorageError: one is no directory.
        """
        self.roots = [Path(os.path.realpath(root)) for root in roots]
        for root in self.roots:
            if not root.is_dir():
                raise StorageError(f"there is no directory {str(root)!r}")

    def path(self, given: object) -> Path:
        """What a request means by a path: relative to the first directory that has it, never outside.

        Raises:
            PathError: it is no such path, or leads out of the directories.
            StorageError: it is not there.
        """
        if not self.roots:
            raise PathError("this server lets no request name a path; start it with --model-dir")
        if not isinstance(given, str) or not given or len(given) > 4096 or "\0" in given:
            raise PathError("a path must be a text, not empty")
        if os.path.isabs(given) or ".." in Path(given).parts:
            raise PathError(f"{given!r} must be relative to a directory of --model-dir, and stay in it")
        for root in self.roots:
            found = Path(os.path.realpath(root / given))
            if found != root and root not in found.parents:
                raise PathError(f"{given!r} leads out of the server's directory")
            if os.path.exists(found):  # Path.exists raises where a name is too long
                return found
        raise StorageError(f"there is no {given!r} in the server's directories")

    def snapshots(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """All snapshots below, where they are, links resolved, and what their headers say."""
        count = 0
        for root in self.roots:
            for folder, below, names in os.walk(root):
                below.sort()
                for name in sorted(names):
                    if not name.endswith(".thaw") or name.startswith("."):
                        continue
                    count += 1
                    if count > MOST:
                        return
                    path = Path(folder, name)
                    yield Path(os.path.realpath(path)), {"path": shown(path.relative_to(root)), **described(path)}


def shown(path: str | os.PathLike[str]) -> str:
    """For people, and for JSON, which has no place for bytes that are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def described(path: Path) -> dict[str, Any]:
    """What a snapshot's header says; of one that cannot be read, why."""
    try:
        with open_snapshot(path, with_chunks=False) as opened:
            header, size = opened.snapshot.header, opened.snapshot.bytes
    except ThawError as error:
        return {"error": str(error)}
    return {
        "bytes": size,
        "model": header.identity.model,
        "content": header.content,
        "engine": header.identity.engine,
        "engine_version": header.identity.engine_version,
        "rank": header.identity.parallel.rank,
    }
