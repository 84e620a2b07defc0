"""What stays between deliveries, for a process that reads again and again: helpers and kernels."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

from ..errors import DeviceError
from . import parallel
from .cuda import Context
from .kernels import Kernels
from .numa import near
from .planes_cuda import LIKELIEST
from .reading_helpers import Helpers, able, most

IDLE = 30.0
"""Seconds without use after which they are ended: 14 sleeping processes of 8 MiB and 56 MiB of page-locked memory."""
ANNOUNCED = 600.0
"""The same where somebody has said that they will be wanted."""


class KeptHelpers:
    """Those of one GPU at a time, lent to one user at a time, and ended when nobody has wanted them for a while.

    A context manager: leaving it ends them, and unloads the kernels.

    Attributes:
        kernels: of any GPU; a few kilobytes, which stay.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._helpers: Helpers | None = None
        self.kernels = Kernels()
        self._loaders: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._until = self._rings = 0.0

    def start(self, device: int, idle: float | None = None) -> None:
        """Have all of it come up, if it can: whoever wants it soon then waits less. Never raises for want of it.

        Args:
            device: ordinal of the GPU, as torch counts.
            idle: seconds for which the helpers wait to be borrowed, at least; None for what was said at first.
        """
        idle = self._idle if idle is None else idle
        with contextlib.suppress(OSError, RuntimeError, DeviceError):  # no memory, process or thread; no driver
            self.load(device)
            with self._lock:
                if self._waiting(device):
                    self._wait(max(idle, self._until - time.monotonic()))
                    return
            found = self.borrow(device)
            if found is not None:
                self.give_back(found, idle)

    def load(self, device: int, *, decoders: bool = True) -> None:
        """Have the kernels loaded: the driver translates them, and others go on meanwhile.

        Args:
            device: see ``start``.
            decoders: also those that are likeliest for compressed chunks.

        Raises:
            RuntimeError: there is no thread for it.
        """
        if device not in self._loaders:
            loader = threading.Thread(target=self._load, args=(device, decoders), name="thaw-kernel", daemon=True)
            loader.start()
            self._loaders[device] = loader

    def _load(self, device: int, decoders: bool) -> None:
        with contextlib.suppress(DeviceError):  # whoever wants one is told then
            self.kernels.sums(device)
            if decoders:
                self.kernels.decoders(device).load(*LIKELIEST)

    def borrow(self, device: int) -> Helpers | None:
        """Those that are there, else new ones; None where there can be none. The caller's until given back.

        Raises:
            OSError, RuntimeError, DeviceError: they cannot be started.
        """
        with self._lock:
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
            return self._waiting(device)

    def give_back(self, helpers: Helpers, idle: float | None = None) -> None:
        """For the next one. Where somebody else has given back his, or they are of no use, they are ended.

        Args:
            idle: see ``start``.
        """
        with self._lock:
            if self._helpers is None and helpers.sound:
                self._helpers, helpers = helpers, None  # type: ignore[assignment]
                self._wait(self._idle if idle is None else idle)
        if helpers is not None:
            helpers.close()

    def rest(self) -> None:
        """End those that nobody has borrowed now, not later: they take some milliseconds for it, in a thread, in which
        memory is unlocked. Kernels stay."""
        with self._lock:
            self._stop()
            found, self._helpers = self._helpers, None
        if found is not None:
            found.close()

    def close(self) -> None:
        """End those that nobody has borrowed, and unload the kernels, which nobody may be using.

        There can be others afterwards.
        """
        self.rest()
        loaders, self._loaders = self._loaders, {}
        for loader in loaders.values():
            loader.join()
        self.kernels.close()

    # With the lock:

    def _waiting(self, device: int) -> bool:
        return self._helpers is not None and self._helpers.sound and self._helpers.device == device

    def _wait(self, idle: float) -> None:
        """End them after so many seconds from now."""
        self._until = time.monotonic() + idle
        if self._timer is None or self._until < self._rings:  # else it sees that it is too early: threads cost time
            self._stop()
            self._set(idle)

    def _set(self, seconds: float) -> None:
        self._rings = time.monotonic() + seconds
        timer = threading.Timer(seconds, self._ring)
        timer.daemon = True
        timer.start()
        self._timer = timer

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():  # stopped too late
                return
            self._timer = None
            found, left = self._helpers, self._until - time.monotonic()
            if found is None:
                return
            if left > 0:
                self._set(left)
                return
            self._helpers = None
        found.close()

    def __enter__(self) -> KeptHelpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
