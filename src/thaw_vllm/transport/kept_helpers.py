"""Helpers that stay between deliveries, for a process that reads again and again."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

from . import parallel
from .cuda import Context
from .numa import near
from .reading_helpers import Helpers, able, most

IDLE = 30.0
"""Seconds without use after which they are ended: 14 sleeping processes of 8 MiB and 56 MiB of page-locked memory."""


class KeptHelpers:
    """Those of one GPU at a time, lent to one user at a time, and ended when nobody has wanted them for a while.

    A context manager: leaving it ends them.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._helpers: Helpers | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def start(self, device: int) -> None:
        """Have them come up, if they can: whoever borrows them soon then waits less. Never raises for want of them.

        Args:
            device: ordinal of the GPU, as torch counts.
        """
        with contextlib.suppress(OSError, RuntimeError):  # no memory, process or thread
            found = self.borrow(device)
            if found is not None:
                self.give_back(found)

    def borrow(self, device: int) -> Helpers | None:
        """Those that are there, else new ones; None where there can be none. The caller's until given back.

        Raises:
            OSError, RuntimeError, DeviceError: they cannot be started.
        """
        with self._lock:
            self._stop()
            found, self._helpers = self._helpers, None
        if found is not None and (not found.sound or found.device != device):
            found.close()
            found = None
        if found is not None or not able():
            return found
        with contextlib.closing(Context(device)) as context:
            count = most(None, len(near(context.bus) or parallel.allowed_cores()))
        return Helpers(device, count) if count else None

    def running(self, device: int) -> bool:
        """Whether there are some that nobody has borrowed."""
        with self._lock:
            return self._helpers is not None and self._helpers.sound and self._helpers.device == device

    def give_back(self, helpers: Helpers) -> None:
        """For the next one. Where somebody else has given back his, or they are of no use, they are ended."""
        with self._lock:
            if self._helpers is None and helpers.sound:
                self._helpers, helpers = helpers, None  # type: ignore[assignment]
                self._stop()
                self._timer = threading.Timer(self._idle, self.close)
                self._timer.daemon = True
                self._timer.start()
        if helpers is not None:
            helpers.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """End those that nobody has borrowed; there can be others afterwards."""
        with self._lock:
            self._stop()
            found, self._helpers = self._helpers, None
        if found is not None:
            found.close()

    def __enter__(self) -> KeptHelpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
