"""What a server prints: in a file as far as there is room, and the end of it in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path
from typing import BinaryIO, cast

MOST = 16 << 20
"""Bytes of a file; then it is called ``NAME.1``, in place of the one before, and another is begun."""
KEPT = 1 << 16
"""Bytes in memory."""
PATIENCE = 0.2
"""Seconds."""
TOLD = 12
"""Lines that an error tells at most."""
_SAYS_WHY = re.compile(r"^error: |^thaw: (?!ready)|\w(Error|Exception): |: error: ")
_ABOVE = "See root cause above"
"""What vLLM ends with where a process of its engine has failed."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ServerLog(asyncio.Protocol):
    """Of one server, which prints into a pipe: many a program ends where it cannot print to a full disk.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = bytearray()
        self._file: BinaryIO | None = None
        self._transport: asyncio.ReadTransport | None = None
        self._over = asyncio.Event()

    async def open(self) -> int:
        """A descriptor for the server to print to; the caller closes it when the server has it."""
        read, write = os.pipe()
        try:
            await asyncio.get_running_loop().connect_read_pipe(lambda: self, os.fdopen(read, "rb", 0))
        except BaseException:
            os.close(write)
            raise
        return write

    async def close(self) -> None:
        """Take no more."""
        if self._transport is not None:
            await self._end_or_so()
            self._transport.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast(asyncio.ReadTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._over.set()

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._end += data
        del self._end[:-KEPT]
        with contextlib.suppress(OSError):
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._file is not None and self._file.tell() >= MOST:
            self._file.close()
            self._file = None
            os.replace(self.path, f"{self.path}.1")
        if self._file is None:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, "ab", 0)
        self._file.write(data)

    async def _end_or_so(self) -> None:
        """What an ended server has printed may still be in the pipe; what it has started may keep that open."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._over.wait(), PATIENCE)

    async def why(self, what: str) -> str:
        """What happened, with the lines that are likely to say why."""
        await self._end_or_so()
        lines = [_COLOUR.sub("", line).rstrip() for line in self._end.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and " WARNING " not in line and "Warning: " not in line]
        told = [number for number, line in enumerate(lines) if _SAYS_WHY.search(line) and _ABOVE not in line]
        shown = lines[told[-1] :][:4] if told else lines[-TOLD:]
        return "; ".join([f"{what} (log: {self.path})", *shown])
