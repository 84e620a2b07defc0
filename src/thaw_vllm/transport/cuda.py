"""CUDA's driver, as far as moving bytes needs it: contexts, streams, events, page-locked memory, copies.

Through ctypes on ``libcuda``, which every machine with an NVIDIA driver has under one name, for two reasons. torch's
``copy_`` releases the interpreter lock around each launch; taking it back among 16 threads costs about 70 µs where the
launch itself takes 5, and the lock then limits what 16 threads copy. And it looks up afresh, at every call, whether
the host memory is page-locked. Calls that return at once therefore keep the lock (``PyDLL``), calls that wait release
it (``CDLL``).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from types import TracebackType
from typing import Any

from ..errors import DeviceError

POINTER, SIZE, ADDRESS, INT, UINT = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_uint,
)

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: not ordered with the default stream."""
_NO_TIMING = 2
"""CU_EVENT_DISABLE_TIMING."""
_NOT_READY = 600
"""CUDA_ERROR_NOT_READY."""
_NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: NVLink has them, PCI Express has not."""
LAZILY = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, without which the driver refuses to open a handle."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


_SIGNATURES: dict[str, list[Any]] = {
    "cuCtxGetCurrent": [POINTER],
    "cuCtxSetCurrent": [POINTER],
    "cuDeviceCanAccessPeer": [POINTER, INT, INT],
    "cuDeviceGet": [POINTER, INT],
    "cuDeviceGetByPCIBusId": [POINTER, ctypes.c_char_p],
    "cuDeviceGetP2PAttribute": [POINTER, INT, INT, INT],
    "cuDeviceGetPCIBusId": [POINTER, INT, INT],
    "cuDevicePrimaryCtxRetain": [POINTER, INT],
    "cuDevicePrimaryCtxRelease_v2": [INT],
    "cuEventCreate": [POINTER, UINT],
    "cuEventDestroy_v2": [POINTER],
    "cuEventQuery": [POINTER],
    "cuEventRecord": [POINTER, POINTER],
    "cuGetErrorName": [INT, POINTER],
    "cuInit": [UINT],
    "cuIpcCloseMemHandle": [ADDRESS],
    "cuIpcGetMemHandle": [POINTER, ADDRESS],
    "cuIpcOpenMemHandle_v2": [POINTER, IpcHandle, UINT],
    "cuLaunchKernel": [POINTER, UINT, UINT, UINT, UINT, UINT, UINT, UINT, POINTER, POINTER, POINTER],
    "cuMemAlloc_v2": [POINTER, SIZE],
    "cuMemGetAddressRange_v2": [POINTER, POINTER, ADDRESS],
    "cuMemGetInfo_v2": [POINTER, POINTER],
    "cuMemFree_v2": [ADDRESS],
    "cuMemHostGetDevicePointer_v2": [POINTER, POINTER, UINT],
    "cuMemHostRegister_v2": [POINTER, SIZE, UINT],
    "cuMemHostUnregister": [POINTER],
    "cuMemcpyDtoDAsync_v2": [ADDRESS, ADDRESS, SIZE, POINTER],
    "cuMemcpyDtoHAsync_v2": [POINTER, ADDRESS, SIZE, POINTER],
    "cuMemcpyHtoDAsync_v2": [ADDRESS, POINTER, SIZE, POINTER],
    "cuMemsetD8Async": [ADDRESS, ctypes.c_ubyte, SIZE, POINTER],
    "cuModuleGetFunction": [POINTER, POINTER, ctypes.c_char_p],
    "cuModuleLoadData": [POINTER, ctypes.c_char_p],
    "cuModuleUnload": [POINTER],
    "cuStreamCreate": [POINTER, UINT],
    "cuStreamDestroy_v2": [POINTER],
    "cuStreamSynchronize": [POINTER],
    "cuStreamWaitEvent": [POINTER, POINTER, UINT],
}

_WAITING = {
    "cuDevicePrimaryCtxRetain",
    "cuIpcCloseMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuMemFree_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuModuleLoadData",
    "cuStreamSynchronize",
}
"""Calls during which other threads go on."""


class Driver:
    """The driver's functions by name, each giving its CUresult; ``check`` turns one that is not 0 into an error."""

    def __init__(self) -> None:
        """
        Raises:
            DeviceError: the machine has no NVIDIA driver.
        """
        try:
            keeping, releasing = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(f"the NVIDIA driver cannot be loaded: {error}") from None
        self.functions: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(releasing if name in _WAITING else keeping, name)
            function.argtypes, function.restype = signature, INT
            self.functions[name] = function
        self.call("cuInit", 0)

    def __getitem__(self, name: str) -> Any:
        return self.functions[name]

    def call(self, name: str, *arguments: Any) -> None:
        """Call it and check."""
        self.check(name, self.functions[name](*arguments))

    def check(self, name: str, result: int) -> None:
        """
        Raises:
            DeviceError: ``result`` is not 0.
        """
        if result:
            text = ctypes.c_char_p()
            self.functions["cuGetErrorName"](result, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {result}"
            raise DeviceError(f"CUDA's {name.partition('_')[0]} failed: {said}")

    def made(self, name: str, *arguments: Any) -> int:
        """Call a function that writes a handle to its first argument; returns the handle."""
        handle = POINTER()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def launch(self, function: int, grid: Sequence[int], threads: int, values: Sequence[Any], stream: int) -> None:
        """Ask for a kernel.

        Args:
            grid: blocks in one, two or three directions.
            threads: of a block.
            values: its parameters, of ctypes' types; the driver has taken them when this returns.
            stream: the stream's handle.
        """
        parameters = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        x, y, z = [*grid, 1, 1][:3]
        self.call("cuLaunchKernel", function, x, y, z, threads, 1, 1, UINT(0), stream, parameters, None)


@cache
def driver() -> Driver:
    """This process's driver; see Driver."""
    return Driver()


def device_at(bus: str) -> int:
    """The ordinal of the GPU with a PCI address, as ``Context.bus`` has it.

    Raises:
        DeviceError: this process sees none there.
    """
    number = INT()
    if driver()["cuDeviceGetByPCIBusId"](ctypes.byref(number), bus.encode()):
        raise DeviceError(f"this process does not see the GPU {bus}; is CUDA_VISIBLE_DEVICES set for it?")
    return number.value


class Context:
    """The primary context of one GPU, the one that torch uses; a thread calls ``enter`` before anything else here.

    Owns a reference to it until closed; every thread has to have ended its work by then.
    """

    def __init__(self, device: int) -> None:
        """
        Args:
            device: ordinal, counted as torch does.

        Raises:
            DeviceError.
        """
        self.driver, self.device = driver(), device
        number = INT()
        self.driver.call("cuDeviceGet", ctypes.byref(number), device)
        self._number = number.value
        self._handle = self.driver.made("cuDevicePrimaryCtxRetain", self._number)

    def enter(self) -> None:
        """Make it the calling thread's."""
        self.driver.call("cuCtxSetCurrent", self._handle)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make it the calling thread's meanwhile: for threads that are not ours, where it says which GPU is current."""
        before = self.driver.made("cuCtxGetCurrent")
        self.enter()
        try:
            yield
        finally:
            self.driver.call("cuCtxSetCurrent", before)

    def free(self) -> int:
        """Bytes of the GPU's memory that nobody has taken; the calling thread has entered the context."""
        free, total = SIZE(), SIZE()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    @property
    def bus(self) -> str:
        """PCI address as the kernel writes it: ``0000:3b:00.0``."""
        text = ctypes.create_string_buffer(32)
        self.driver.call("cuDeviceGetPCIBusId", ctypes.addressof(text), len(text), self._number)
        return text.value.decode().lower()

    def reaches(self, bus: str) -> str | None:
        """Over what this GPU reaches the memory of another one: ``NVLink`` or ``PCI Express``; None where this process
        does not see that one, and cannot tell.

        Args:
            bus: the other's ``bus``.

        Raises:
            DeviceError: it does not reach it.
        """
        number, found = INT(), INT()
        if self.driver["cuDeviceGetByPCIBusId"](ctypes.byref(number), bus.encode()):
            return None
        self.driver.call("cuDeviceCanAccessPeer", ctypes.byref(found), self._number, number.value)
        if not found.value:
            raise DeviceError(f"cuda:{self.device} has no peer access to the GPU {bus}")
        pair = self._number, number.value
        self.driver.call("cuDeviceGetP2PAttribute", ctypes.byref(found), _NATIVE_ATOMICS, *pair)
        return "NVLink" if found.value else "PCI Express"

    def close(self) -> None:
        """Let go of it; a second call does nothing."""
        if self._handle:
            self._handle = 0
            self.driver.call("cuDevicePrimaryCtxRelease_v2", self._number)

    def __enter__(self) -> Context:
        self.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Stream:
    """A stream of the calling thread's context, with events; close it in a thread that has entered the context."""

    def __init__(self, context: Context, events: int = 0) -> None:
        self._driver = context.driver
        self.handle = self._driver.made("cuStreamCreate", _NON_BLOCKING)
        self.events: list[int] = []
        try:
            for _ in range(events):
                self.events.append(self._driver.made("cuEventCreate", _NO_TIMING))
        except BaseException:
            self.close()
            raise

    def synchronize(self) -> None:
        """Wait until everything asked of it is done."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def mark(self, number: int) -> None:
        """Set an event, by its number, after everything asked of the stream so far."""
        self._driver.call("cuEventRecord", self.events[number], self.handle)

    def passed(self, number: int) -> bool:
        """Whether everything before the event's last mark is done."""
        result: int = self._driver["cuEventQuery"](self.events[number])
        if result not in (0, _NOT_READY):
            self._driver.check("cuEventQuery", result)
        return result == 0

    def close(self) -> None:
        """Wait, then destroy; a second call does nothing."""
        handle, self.handle = self.handle, 0
        if not handle:
            return
        try:
            self._driver.call("cuStreamSynchronize", handle)
        finally:
            for event in self.events:
                self._driver["cuEventDestroy_v2"](event)
            self._driver["cuStreamDestroy_v2"](handle)
