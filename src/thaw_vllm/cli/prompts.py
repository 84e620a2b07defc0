"""Prompts and token ids out of files, for a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def text_of(path: Path) -> str:
    """A text file as it is.

    Raises:
        UsageError: it is no UTF-8; StorageError: it cannot be read.
    """
    from ..errors import StorageError, UsageError

    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise UsageError(f"{str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def lists_of(path: Path) -> list[Any]:
    """Lists of token ids, where one list counts as a list of one; the server looks closer.

    Raises:
        UsageError: it holds something else; StorageError: it cannot be read.
    """
    from ..errors import UsageError

    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(found, list) or not found:
        raise UsageError(f"{str(path)!r} must hold a JSON list of token ids, or of such lists")
    return found if isinstance(found[0], list) else [found]
