"""Whether a fork pool's engines have one copy of their weights in common, and the process that holds it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from ....errors import DeviceError, UnsupportedError, UsageError
from .pool_process import Child

PROGRAM = "thaw_vllm.engines.vllm.sessions.pool_holder"
_RANKS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")

logger = logging.getLogger(__name__)


class SharedWeights:
    """The one copy, which a process of its own holds; started when an engine needs it, and again when it has died."""

    def __init__(
        self,
        snapshot: str | None,
        engine_args: dict[str, Any],
        wanted: bool | None,
        zygote: str | None,
        closing: threading.Event,
    ) -> None:
        """
        Args:
            snapshot: a path; None: vLLM loads the weights.
            wanted: whether there shall be one copy; None: where there can be.

        Raises:
            UsageError: it is wanted of engines that cannot have it.
        """
        ranks = [name for name in _RANKS if engine_args.get(name, 1) != 1]
        if wanted and (snapshot is None or ranks):
            why = "come from a snapshot" if snapshot is None else f"are of one rank; leave {ranks[0]} out"
            raise UsageError(f"weights can be shared where they {why}")
        here = next(Path("/dev").glob("nvidia[0-9]*"), None) is not None
        self.asked = wanted if wanted is not None else here and snapshot is not None and not ranks
        self._forced, self._snapshot, self._zygote = wanted is True, snapshot, zygote
        self._child = Child("the process that holds the weights", closing)
        self._lock, self._starts = threading.Lock(), 0
        self._told: dict[str, Any] = {}
        self._holder: int | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that holds them; None: there is none."""
        return self._child.pid and self._holder

    def there(self, folder: Path, logs: Path, until: float) -> dict[str, Any] | None:
        """``socket`` at which engines ask for them, their ``bytes`` and the GPU's ``memory``; None: each has its own.

        Raises:
            ThawError, OSError: they cannot be held.
            TimeoutError: not in time.
        """
        with self._lock:
            if not self.asked:
                return None
            if self._child.pid is None or not Path(f"/proc/{self._holder}").exists():
                self._start(folder, logs, until)
            return self._told

    def _start(self, folder: Path, logs: Path, until: float) -> None:
        self._child.end()
        self._starts += 1
        path, place = (folder / f"{name}{self._starts}.sock" for name in ("w-", "w"))
        try:
            self._child.start(PROGRAM, path=path, log=logs / "weights.log", until=until, zygote=self._zygote)
            told = self._child.asked({"snapshot": self._snapshot, "socket": os.fspath(place)}, until)
        except BaseException:
            self._child.end()
            raise
        self._told, self._holder = told | {"socket": os.fspath(place)}, told["holder"]

    def given_up(self, error: Exception) -> bool:
        """Whether an engine that could not be started with them is to try it with its own."""
        with self._lock:
            if self.asked and not self._forced and isinstance(error, (UnsupportedError, DeviceError)):
                logger.warning("each engine of the fork pool has weights of its own: %s", error)
                self.asked = False
                self._child.end()
            return not self.asked

    def interrupt(self) -> None:
        """Have whoever waits for it see that the pool is closing."""
        self._child.interrupt()

    def end(self) -> None:
        """End it; no engine may run any more."""
        with self._lock:
            self._child.end()
