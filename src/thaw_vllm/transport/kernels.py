"""Kernels that stay loaded between deliveries: each time it would take milliseconds, and wait for copies under way."""

from __future__ import annotations

import contextlib
import threading

from .planes_cuda import PlaneKernels
from .wordsum_cuda import Kernel


class Kernels:
    """Those of each GPU, loaded when somebody first wants them, for any number of threads; its own until closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[int, Kernel] = {}
        self._decoders: dict[int, PlaneKernels] = {}

    def sums(self, device: int) -> Kernel:
        """That which sums chunks, borrowed.

        Raises:
            DeviceError: the driver does not take it.
        """
        with self._lock:
            if device not in self._sums:
                self._sums[device] = Kernel(device)
            return self._sums[device]

    def decoders(self, device: int) -> PlaneKernels:
        """Those that decode compressed chunks, borrowed; each is loaded when it is needed."""
        with self._lock:
            if device not in self._decoders:
                self._decoders[device] = PlaneKernels(device)
            return self._decoders[device]

    def close(self) -> None:
        """Unload them; nothing may be running. There can be others afterwards."""
        with self._lock, contextlib.ExitStack() as stack:  # each in any case
            for kernel in self._sums.values():
                stack.callback(kernel.close)
            for decoders in self._decoders.values():
                stack.callback(decoders.close)
            self._sums, self._decoders = {}, {}
