"""Stored bytes to original bytes and back.

A codec is one file here, one line in the table, and a number in docs/format.md.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from ..format.chunks import PLANES, RAW

_LARGE = 1 << 20
NAMES: dict[int, str] = {RAW: "raw", PLANES: "planes"}


def encode(data: memoryview, width: int) -> tuple[int, bytes | memoryview]:
    """The codec of a chunk, and its stored bytes: ``data`` itself where no codec makes it shorter.

    Args:
        width: bytes of the elements that the chunk holds.
    """
    from . import planes

    frame = planes.encode(data, width, _for(len(data)))
    return (RAW, data) if frame is None else (PLANES, frame)


def decode(codec: int, stored: memoryview, out: memoryview) -> None:
    """A chunk's original bytes, into ``out``; what they are worth their checksums tell.

    Raises:
        FormatError: the stored bytes are not what the codec makes of so many.
    """
    from . import planes

    if codec == PLANES:
        planes.decode(stored, out, _for(len(out)))
    else:
        out[:] = stored


def _for(size: int) -> Any:
    """numpy for what is small: numba takes 0.4 s to come up. And where an engine has not begun yet nothing large is
    read, which has to be so: vLLM 0.32's CPU build looks through all modules when a worker starts, and fails at
    llvmlite's, numba's compiler."""
    return tools() if size >= _LARGE else None


@functools.cache
def quick() -> bool:
    """Whether numba is installed; does not import it."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def tools() -> Any:
    """numba's machine code where numba is installed, else numpy."""
    from . import planes

    try:
        from . import planes_numba
    except ImportError:
        return planes
    planes_numba.ready()
    return planes_numba
