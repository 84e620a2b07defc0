"""Memory that processes of one machine have in common: one makes it and fills it, the others map it and read.

On an NVIDIA GPU through CUDA's interprocess handles (CUDA driver API, ``cuIpcGetMemHandle``): what is mapped is the
memory itself. The one who made it has to live as long as others map it. Through the driver rather than
``torch.multiprocessing``, which counts references in files of its own and passes handles in pickles.

On the host a memory file, which others map privately: what one of them writes is a page of its own from then on.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import torch

from ..errors import DeviceError, MismatchError, StorageError, ThawError
from .cuda import LAZILY, Context, IpcHandle
from .links import by_driver

_WHOLE = 2 << 20
"""Bytes of which CUDA wants a multiple: a smaller allocation may be part of another's block, and a handle is of all."""


class Made:
    """Memory made to be shared; owns it until closed, or until the process ends.

    Attributes:
        tensor: all of it: uint8, shape ``(bytes,)``; its first byte is aligned to 256 at least.
        told: for ``mapped`` in another process; plain values.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """
        Args:
            size: bytes, at least 1.
            device: the host, or an NVIDIA GPU.

        Raises:
            DeviceError: another device; the GPU has not so much memory left.
            StorageError: the host has not.
        """
        self._address, self._file = 0, -1
        self._context: Context | None = None
        if device.type == "cpu":
            self._file = os.memfd_create("thaw-weights", os.MFD_CLOEXEC)
            try:
                os.posix_fallocate(self._file, 0, size)
                memory = mmap.mmap(self._file, size)
            except OSError as error:
                os.close(self._file)
                raise StorageError(f"{size / 1e9:.1f} GB of memory to share cannot be had: {error.strerror}") from None
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
            self.told: dict[str, Any] = {"bytes": size, "file": f"/proc/{os.getpid()}/fd/{self._file}"}
            return
        if not by_driver(device):
            raise DeviceError(f"memory of {device} cannot be shared between processes; of an NVIDIA GPU it can")
        context, handle = Context(device.index or 0), IpcHandle()
        try:
            with context.entered():
                try:
                    self._address = context.driver.made("cuMemAlloc_v2", -(-size // _WHOLE) * _WHOLE)
                except DeviceError as error:
                    raise DeviceError(f"{size / 1e9:.1f} GB of {device} to share cannot be had: {error}") from None
                try:
                    context.driver.call("cuIpcGetMemHandle", ctypes.byref(handle), self._address)
                    self.tensor = _tensor(self._address, size, device)
                except BaseException:
                    context.driver.call("cuMemFree_v2", self._address)
                    raise
        except BaseException:
            context.close()
            raise
        self._context = context
        self.told = {"bytes": size, "gpu": context.bus, "handle": bytes(handle.reserved).hex()}

    def close(self) -> None:
        """Let go of it; nobody may use it any more. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            del self.tensor
        if self._context is not None:
            del self.tensor
            with self._context.entered():
                self._context.driver.call("cuMemFree_v2", self._address)
            self._context.close()
            self._context = None


def mapped(told: dict[str, Any], device: torch.device) -> torch.Tensor:
    """What another process has made, as a tensor: uint8, shape ``(bytes,)``; for reading only.

    It stays mapped until this process ends.

    Args:
        told: ``Made.told``.
        device: where it has to be.

    Raises:
        MismatchError: it is somewhere else.
        DeviceError, StorageError: it cannot be mapped; the process that made it may be gone.
    """
    size = told["bytes"]
    if (device.type == "cpu") != ("file" in told):
        raise MismatchError(f"the weights to share are {'in the host' if 'file' in told else 'in a GPU'}'s memory")
    if device.type == "cpu":
        try:
            with open(told["file"], "rb") as file:
                memory = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise StorageError(f"the memory to share cannot be mapped: {error}") from None
        return torch.frombuffer(memory, dtype=torch.uint8)
    context = Context(device.index or 0)
    if context.bus != told["gpu"]:
        raise MismatchError(f"the weights to share are on the GPU {told['gpu']}, this engine is on {context.bus}")
    handle = IpcHandle.from_buffer_copy(bytes.fromhex(told["handle"]))
    with context.entered():
        try:
            address = context.driver.made("cuIpcOpenMemHandle_v2", handle, LAZILY)
        except DeviceError as error:
            raise DeviceError(f"the memory to share cannot be mapped: {error}") from None
    return _tensor(address, size, device)


class _Array:
    """Device memory for ``torch.as_tensor``, by CUDA's array interface (version 3)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _tensor(address: int, size: int, device: torch.device) -> torch.Tensor:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    found = torch.as_tensor(_Array(address, size), device=device)
    if found.data_ptr() != address:
        raise ThawError("torch has copied memory that it should have taken as it is")
    return found
