"""One engine of a pool: ``thaw serve`` for one model, in a process of its own behind a private Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from ..engines.vllm.command_line import given
from ..engines.vllm.kv.access import SNAPSHOTS_VARIABLE, TOKEN_HEADER, TOKEN_VARIABLE
from ..engines.vllm.serve_variables import PARENT_VARIABLE, START_VARIABLE
from ..errors import BusyError, ThawError
from .config import Model
from .kept_snapshots import outdated
from .log import ServerLog
from .resident import BusyEngineError, Done, RefusedError

KEY_VARIABLE = "VLLM_API_KEY"
KEEP_ALIVE = 2.0
"""Seconds that a connection is kept for the next request; less than vLLM's server keeps it (5)."""
START_LIMIT = 3600.0
"""Seconds in which a server has to be healthy; a first start may download and compile."""
STOP_LIMIT = 30.0
"""Seconds from SIGTERM to SIGKILL."""
CHANGE_LIMIT = 600.0
"""Seconds for a swap, for parking and for waking."""
MEMORY = 0.9
"""Of a GPU's memory, what models of all shares take together where nothing is said; the rest is for CUDA's contexts."""
_POLL = 0.05
_REFUSALS = (400, 403, 404, 409, 422, 501, 507)
"""What a server answers that has changed nothing."""


@dataclass(frozen=True)
class Runtime:
    """What the engines of a pool share.

    Attributes:
        directory: for sockets, of the user alone; its path is short.
        logs: for what engines print.
        options: further words for each ``thaw serve``.
        gpu: whether engines are on one, so that they can sleep.
        known: of models that name no snapshot, the one in the cache that an engine was filled from, or froze.
    """

    directory: Path
    logs: Path
    options: tuple[str, ...] = ()
    gpu: bool = False
    known: dict[str, str] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)


class ServerEngine:
    """A server process; ``resident.Engine``.

    Attributes:
        session: of HTTP requests to it, paths only matter: ``http://engine/…``. None until it is started.
        log: what it prints.
        snapshot: that its weights are from; None while that is not known, or where there is none.
        key: its API key; whoever may ask models the router knows.
    """

    def __init__(self, model: Model, runtime: Runtime) -> None:
        self.model, self._runtime = model, runtime
        number = next(runtime.numbers)
        self.socket = runtime.directory / f"{number}.sock"
        self.log = ServerLog(runtime.logs / f"{number}.log")
        self._snapshots = runtime.directory / f"{number}.snapshots"
        self._token, self.key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        self._process: asyncio.subprocess.Process | None = None
        self.session: aiohttp.ClientSession | None = None
        self._unswappable = False
        self.snapshot: str | None = None

    @property
    def pid(self) -> int | None:
        """Of ``thaw serve``."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Raises:
        ThawError: it ended, or was not healthy in time.
        """
        self._snapshots.mkdir(mode=0o700)
        environment = os.environ | {
            TOKEN_VARIABLE: self._token,
            KEY_VARIABLE: self.key,
            SNAPSHOTS_VARIABLE: str(self._snapshots),
            PARENT_VARIABLE: str(os.getpid()),
        }
        environment.pop(START_VARIABLE, None)  # each has a report of its own
        output = await self.log.open()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # keys of a terminal are the pool's, which lets requests end first
            )
        finally:
            os.close(output)
        connector = aiohttp.UnixConnector(str(self.socket), limit=0, keepalive_timeout=KEEP_ALIVE)
        timeout, jar = aiohttp.ClientTimeout(total=None, connect=10), aiohttp.DummyCookieJar()
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=jar, auto_decompress=False
        )
        healthy = asyncio.ensure_future(self._healthy())
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({healthy, ended}, timeout=START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if healthy.done():
                healthy.result()
                await self._learn()
                return None
            if ended.done():
                raise ThawError(await self.log.why(f"its server ended with {ended.result()}"))
            raise ThawError(await self.log.why(f"its server was not healthy within {START_LIMIT:.0f} s"))
        finally:
            for task in (healthy, ended):
                task.cancel()

    def _command(self) -> list[str]:
        model = self.model
        words = [sys.executable, "-m", "thaw_vllm", "serve", "--model", model.path, *self._runtime.options]
        if model.snapshot is not None:
            words += ["--snapshot", model.snapshot]
        words += ["--served-model-name", model.name, "--uds", str(self.socket), *model.args]
        chosen = given([*self._runtime.options, *model.args])
        if self._runtime.gpu and model.park and "enable_sleep_mode" not in chosen:
            words.append("--enable-sleep-mode")
        if self._runtime.gpu and not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & chosen.keys():
            words += ["--gpu-memory-utilization", f"{MEMORY * model.share:.3f}"]
        return words

    async def _healthy(self) -> None:
        assert self.session is not None
        while True:
            if self.socket.exists():
                with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    async with self.session.get("http://engine/health") as answer:
                        if answer.status == 200:
                            return
            await asyncio.sleep(_POLL)

    async def _learn(self) -> None:
        """Which snapshot it was filled from, where it has found one itself."""
        self.snapshot = self.model.snapshot
        if self.snapshot is not None:
            return
        with contextlib.suppress(ThawError):  # what is the matter then, the next request will tell
            _, found = await self.ask("engine/state")
            path = found.get("snapshot")
            if isinstance(path, str):
                self.snapshot = self._runtime.known[self.model.name] = path

    def _of(self, model: Model) -> str | None:
        """A model's snapshot, as far as that is known: one that names none has to be started first."""
        return model.snapshot or self._runtime.known.get(model.name)

    def swaps(self, model: Model) -> bool:
        """Both are snapshots, and nothing else is asked for; the engine itself proves the rest."""
        if self._unswappable or self.snapshot is None or self._of(model) is None:
            return False
        return model.args == self.model.args

    async def swap(self, model: Model) -> Done:
        """Raises:
        RefusedError, ThawError: see ``resident.Engine``.
        """
        snapshot = self._of(model)
        assert snapshot is not None
        if model.snapshot is None:
            why = await asyncio.to_thread(outdated, model, self._runtime.options, snapshot)
            if why is not None:
                self._runtime.known.pop(model.name, None)
                raise RefusedError(f"the snapshot of {model.name!r} in the cache is of no use: {why}")
        name = f"{next(self._runtime.numbers)}.thaw"
        link = self._snapshots / name
        link.symlink_to(os.path.realpath(snapshot))
        try:
            done = await self._change("swap", {"name": name, "deadline": 0, "served_name": model.name})
        finally:
            link.unlink(missing_ok=True)
        self.model, self.snapshot = model, snapshot
        return done

    def parks(self) -> bool:
        """It has sleep mode, and its weights are in a snapshot."""
        return self._runtime.gpu and self.snapshot is not None

    async def park(self) -> Done:
        """Raises:
        RefusedError, ThawError: see ``resident.Engine``.
        """
        return await self._change("park", {"deadline": 0})

    async def wake(self) -> Done:
        """Raises:
        ThawError: it did not.
        """
        return await self._change("wake", {})

    async def _change(self, what: str, body: Mapping[str, Any]) -> Done:
        status, found = await self.ask(f"engine/{what}", json.dumps(body).encode())
        if status == 200:
            seconds = {phase: took for phase, took in found.get("seconds", {}).items() if phase != "total"}
            return Done(seconds, int(found.get("host_bytes", 0)))
        told = found.get("error")
        why = str(told.get("message")) if isinstance(told, dict) else f"its server answered {status}"
        if isinstance(told, dict) and told.get("type") == BusyError.__name__:
            raise BusyEngineError(why)
        if status in _REFUSALS:
            self._unswappable |= what == "swap" and status == 501
            raise RefusedError(why)
        raise ThawError(why)

    async def ask(self, what: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and document of a route of thaw's: one that takes a body, or one that is only asked.

        Raises:
            ThawError: there is no answer.
        """
        assert self.session is not None
        try:
            async with self.session.request(
                "GET" if body is None else "POST",
                f"http://engine/v1/thaw/{what}",
                data=body,
                headers={
                    TOKEN_HEADER: self._token,
                    "Authorization": f"Bearer {self.key}",
                    "Content-Type": "application/json",
                },
                timeout=aiohttp.ClientTimeout(total=CHANGE_LIMIT),
            ) as answer:
                status, raw = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, RuntimeError) as error:
            raise ThawError(await self.log.why(f"its server did not answer ({type(error).__name__})")) from None
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        return status, found if isinstance(found, dict) else {}

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left after STOP_LIMIT."""
        if self.session is not None:
            await self.session.close()
        process = self._process
        if process is not None:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), STOP_LIMIT)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
            await process.wait()
        await self.log.close()
        with contextlib.suppress(OSError):
            self.socket.unlink()
        with contextlib.suppress(OSError):
            for link in self._snapshots.iterdir():
                link.unlink()
            self._snapshots.rmdir()

    async def ended(self) -> str:
        """Why the process has ended, with the end of its log."""
        assert self._process is not None
        code = await self._process.wait()
        return await self.log.why(f"its server ended with {code}")
