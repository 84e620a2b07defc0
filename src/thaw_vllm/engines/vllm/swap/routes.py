"""Routes of vLLM's own server that swap weights and park the engine; ``kv/routes.py`` adds them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ....errors import UnsupportedError, UsageError
from ....zygote.memory import resident
from ....zygote.processes import below
from ..kv.access import Access
from ..kv.bodies import Parking, Swapping, Waking
from .api import swap_weights_async
from .parked import Parked, park_async, wake_async

logger = logging.getLogger(__name__)


@dataclass
class Engine:
    """A server's engine as a whole: alone changed, and awake or parked.

    Attributes:
        client: vLLM's.
        fronts: processes that take requests.
        name: have the server call its model so; None where it cannot.
        parked: what waking needs; None while it is awake.
        snapshot: whose weights it has, of those that it may be asked to take again; None where it has others.
    """

    client: Any
    fronts: int = 1
    name: Callable[[str], None] | None = None
    parked: Parked | None = None
    snapshot: str | None = None
    _asked: bool = False
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def require_awake(self) -> None:
        """Raises:
        UsageError: it is parked.
        """
        if self.parked is not None:
            raise UsageError("the engine is parked; wake it up first (thaw wake)")

    def state(self) -> dict[str, Any]:
        """For people."""
        parked = self.parked
        if parked is None:
            return {"parked": False}
        return {"parked": True, "driver": parked.driver, "why": parked.why, "seconds": parked.seconds}

    async def source(self) -> str | None:
        """``snapshot``; asked of a worker the first time, once the model is loaded."""
        if not self._asked and self.parked is None and not self._changing.locked():
            try:
                outcome = (await self.client.collective_rpc("thaw_outcome"))[0]
            except Exception as error:  # a loader that is not thaw's, or an engine that has died, which others tell
                logger.debug("where the weights are from cannot be told: %s", error)
                return None
            if not self._asked:  # or it was swapped meanwhile
                self.snapshot, self._asked = outcome and outcome["path"], True
        return self.snapshot

    async def swap(self, body: Swapping, access: Access) -> dict[str, Any]:
        """``swap_weights_async``, by the snapshot's name.

        Raises:
            UsageError: it is parked, or another change is under way.
            StorageError: it cannot be read.
        """
        path = os.path.realpath(access.snapshot(body.name))  # a link may be gone when the engine is to be woken
        if body.served_name is not None and self.name is None:
            raise UnsupportedError("this vLLM does not let its model be called otherwise; leave served_name out")
        async with self._change():
            self.require_awake()
            report = await swap_weights_async(self.client, path, verify=body.verify, deadline=body.deadline)
            self.snapshot, self._asked = path, True
            if body.served_name is not None and self.name is not None:
                self.name(body.served_name)
            return asdict(report)

    async def park(self, body: Parking, access: Access) -> dict[str, Any]:
        """``park_async``; files are told by their names, and ``host_bytes``: what the server's processes take then."""
        kv = None if body.kv is None else access.target(body.kv, body.force)
        async with self._change():
            self.require_awake()
            self.parked = await park_async(
                self.client,
                kv=kv,
                keep_weights=body.keep_weights,
                driver=body.driver,
                force=body.force,
                deadline=body.deadline,
            )
            told = asdict(self.parked) | {"kv": None if self.parked.kv is None else os.path.basename(self.parked.kv)}
            told["host_bytes"] = (await asyncio.to_thread(resident, [os.getpid(), *below(os.getpid())]))["proportional"]
        return {name: value for name, value in told.items() if name not in ("path", "pids")}

    async def wake(self, body: Waking) -> dict[str, Any]:
        """``wake_async``."""
        async with self._change():
            if self.parked is None:
                raise UsageError("the engine is not parked")
            report = await wake_async(self.client, self.parked, verify=body.verify)
            self.parked = None
        return asdict(report)

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        if self.fronts > 1:
            raise UnsupportedError(
                f"this server has {self.fronts} front ends, which would not know of it; serve with --api-server-count 1"
            )
        if self._changing.locked():
            raise UsageError("the engine is being swapped, parked or woken; ask again when that has ended")
        async with self._changing:
            yield
