"""Triton's lists of a kernel's files, which name them by absolute paths; in a file of caches they have none.

``FileCacheManager.put_group`` in triton/runtime/cache.py writes them, ``get_group`` looks for each path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BEGIN, _END, _KEY = "__grp__", ".json", "child_paths"


def relative(path: str, data: bytes, directory: Path) -> bytes:
    """A list as it is packed: of names in its own directory; anything else as it is.

    A kernel's directory is named by a hash, and its parents may be reached through links, so the name is compared.
    """
    found = _group(path, data)
    if found is None or any(Path(child).parent.name != directory.name for child in found[_KEY].values()):
        return data
    return json.dumps(found | {_KEY: {name: Path(child).name for name, child in found[_KEY].items()}}).encode()


def absolute(path: str, data: bytes, directory: Path) -> bytes:
    """A list as Triton reads it, of files in ``directory``; anything else as it is."""
    found = _group(path, data)
    if found is None or any("/" in child or child in ("", ".", "..") for child in found[_KEY].values()):
        return data
    return json.dumps(found | {_KEY: {name: str(directory / child) for name, child in found[_KEY].items()}}).encode()


def is_list(path: str) -> bool:
    """Whether a file is named as such a list."""
    name = path.rpartition("/")[2]
    return name.startswith(_BEGIN) and name.endswith(_END)


def _group(path: str, data: bytes) -> dict[str, Any] | None:
    if not is_list(path):
        return None
    try:
        found = json.loads(data)
        children = found[_KEY]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    sound = isinstance(children, dict) and all(isinstance(child, str) for child in children.values())
    return found if sound else None
