"""What servers tell of a store to others: its files by their names, and nothing of where it is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from ..errors import ThawError

STORE = "the server's store"


@contextlib.contextmanager
def nameless(directory: str) -> Iterator[None]:
    """Errors say nothing of where the store is.

    Args:
        directory: of the store, absolute.
    """
    try:
        yield
    except ThawError as error:
        raise type(error)(without_paths(str(error), directory)) from None


def without_paths(message: str, directory: str) -> str:
    """A message in which files of a store are named by their last part, and the store itself not at all."""
    place = re.escape(repr(os.path.abspath(directory))[1:-1])
    files = re.compile(rf"(['\"]?){place}((?:/[\w.-]+)*)(?![\w.-])/?\1")
    return files.sub(lambda found: repr(os.path.basename(found[2])) if found[2] else STORE, message)
