"""What the page shows beside the pool's state: starts, usage, snapshots, files of KV blocks, verification."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from ..engines.vllm.kv.access import ENDING, checked_name
from ..errors import StorageError, UsageError
from .bodies import parsed
from .directories import MOST, Directories, described, shown
from .pool import Pool
from .resident import UnknownModelError
from .starts import Starts
from .usage import Usage
from .verification import Verification


class What(BaseModel):
    """What is to be verified; one of the three.

    Attributes:
        path: a snapshot, relative to a directory of the server's.
        model: that of this model.
        kv: a file of KV blocks, by its name.
    """

    model_config = ConfigDict(extra="forbid")

    path: str | None = None
    model: str | None = None
    kv: str | None = None


class Overview:
    """Its routes.

    Attributes:
        verification: of snapshots, one at a time.
    """

    def __init__(self, pool: Pool, directories: Directories, kv_directory: str | None) -> None:
        """
        Args:
            kv_directory: where the engines' files of KV blocks are.
        """
        self._pool, self._directories = pool, directories
        self._kv = None if kv_directory is None else Path(os.path.realpath(kv_directory))
        self._usage, self._starts = Usage(pool), Starts()
        self.verification = Verification(pool.events)
        pool.events.listeners.append(self._starts.note)

    async def usage(self) -> dict[str, Any]:
        """Tokens and cached prefixes by engine, since each was started."""
        return await self._usage.document()

    async def starts(self) -> dict[str, Any]:
        """The last starts of engines, and their phases."""
        return {"starts": await asyncio.to_thread(self._starts.documents)}

    async def snapshots(self) -> dict[str, Any]:
        """Snapshots in the server's directories and those of its models, and what their headers say."""
        return {"snapshots": await asyncio.to_thread(lambda: list(self._listed()))}

    async def kv_files(self) -> dict[str, Any]:
        """Files of KV blocks in the server's directory, and what their headers say."""
        there = self._kv is not None and self._kv.is_dir()
        return {"directory": there, "files": await asyncio.to_thread(lambda: list(self._kv_listed()))}

    async def verified(self) -> dict[str, Any]:
        """What is being verified, and what was found the last time."""
        return self.verification.document()

    async def verify(self, request: Request) -> JSONResponse:
        """Begin to verify a snapshot."""
        body = await parsed(request, What)
        self.verification.begin(body.model_dump(exclude_none=True), await asyncio.to_thread(self._path, body))
        return JSONResponse(self.verification.document(), 202)

    async def cancel(self) -> dict[str, Any]:
        """Break off what is being verified."""
        await self.verification.end()
        return self.verification.document()

    def _listed(self) -> Iterator[dict[str, Any]]:
        owners: dict[Path, list[str]] = {}
        for name in self._pool.models:
            if (snapshot := self._pool.snapshot(name)) is not None:
                owners.setdefault(Path(os.path.realpath(snapshot)), []).append(name)
        for path, found in self._directories.snapshots():
            yield found | {"what": {"path": found["path"]}, "models": owners.pop(path, [])}
        for path, names in owners.items():
            yield {"path": shown(path.name), **described(path), "what": {"model": names[0]}, "models": names}

    def _kv_listed(self) -> Iterator[dict[str, Any]]:
        if self._kv is None or not self._kv.is_dir():
            return
        names = sorted(name for name in os.listdir(self._kv) if name.endswith(ENDING) and not name.startswith("."))
        for name in names[:MOST]:
            told = shown(name)
            yield {"name": told, **described(self._kv / name), "what": {"kv": told}}

    def _path(self, body: What) -> Path:
        if body.path is not None and body.model is body.kv is None:
            return self._directories.path(body.path)
        if body.model is not None and body.path is body.kv is None:
            if body.model not in self._pool.models:
                raise UnknownModelError(f"there is no model {body.model!r}")
            snapshot = self._pool.snapshot(body.model)
            if snapshot is None:
                raise UsageError(f"of the model {body.model!r} no snapshot is known; start it, and ask again")
            return Path(snapshot)
        if body.kv is not None and body.path is body.model is None:
            return self._kv_path(checked_name(body.kv))
        raise UsageError("name one of path, model and kv")

    def _kv_path(self, name: str) -> Path:
        if self._kv is None:
            raise UsageError("this server has no directory for files of KV blocks; start it with --kv-dir")
        path = Path(os.path.realpath(self._kv / name))
        if path.parent != self._kv or not path.is_file():
            raise StorageError(f"there is no file {name!r} in the server's directory")
        return path
