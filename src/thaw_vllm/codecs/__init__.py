"""Stored bytes to original bytes and back.

A codec is one file here, one line in the table, and a number in docs/format.md.
"""

from __future__ import annotations

import functools
from typing import Any

from ..format.chunks import PLANES, RAW

NAMES: dict[int, str] = {RAW: "raw", PLANES: "planes"}


def encode(data: memoryview, width: int) -> tuple[int, bytes | memoryview]:
    """The codec of a chunk, and its stored bytes: ``data`` itself where no codec makes it shorter.

    Args:
        width: bytes of the elements that the chunk holds.
    """
    from . import planes

    frame = planes.encode(data, width, tools())
    return (RAW, data) if frame is None else (PLANES, frame)


def decode(codec: int, stored: memoryview, out: memoryview) -> None:
    """A chunk's original bytes, into ``out``; what they are worth their checksums tell.

    Raises:
        FormatError: the stored bytes are not what the codec makes of so many.
    """
    from . import planes

    if codec == PLANES:
        planes.decode(stored, out, tools())
    else:
        out[:] = stored


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
