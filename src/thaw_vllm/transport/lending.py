"""Memory of one process from which another of the same host copies, without the host's memory or a disk in between.

On NVIDIA GPUs the borrower maps the lender's allocations (CUDA's interprocess handles, as ``shared``) and copies from
them: on one GPU within its memory, between two over NVLink or PCI Express. It maps them in its own context, with peer
access as it is first used, so that nothing of it appears on the other GPU. On the host the lender writes its bytes to a
sealed memory file and passes its descriptor.

The lender's memory must stay what and where it is as long as somebody borrows it; ``offers`` sees to that.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, MismatchError, StorageError
from .borrowed_gpu import BorrowedGpu, Run, number_of
from .cuda import ADDRESS, SIZE, Context, IpcHandle, device_at
from .links import by_driver
from .source import MemorySource, copy

if TYPE_CHECKING:
    import torch

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What a borrower asks of a memory file: reading beyond the end of one that was cut off would end its process."""
_STEP = 16 << 20
"""Bytes that the lender writes to a memory file at a time."""
_OTHER_WORDS = "{} are told of in other words; is the other process of another version of thaw?"
_BUS = re.compile(r"[0-9a-f:.]{1,32}")


class Lent:
    """Where runs of this process's memory lie, as others are told; borrows them, and owns nothing of the GPU's.

    Everything that is asked of the driver is asked when this is made: later, CUDA graphs may be under way, during whose
    capture other threads may not ask it.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        """
        Args:
            runs: each within one allocation, none empty.
            device: where they are: the host, or an NVIDIA GPU.

        Raises:
            DeviceError: another device, or memory of which the driver gives no handle.
        """
        self._runs, self._gpu = runs, None
        if device.type == "cpu":
            return
        if not by_driver(device):
            raise DeviceError(f"memory of {device} cannot be lent to other processes; of an NVIDIA GPU it can")
        context = Context(device.index or 0)
        try:
            with context.entered():
                self._gpu = _exported(context, runs)
        finally:
            context.close()

    def told(self) -> tuple[dict[str, Any], list[int]]:
        """Plain values for ``borrow``, and descriptors that go with them, the caller's to close.

        Raises:
            StorageError: the host has no memory for a copy of its bytes.
        """
        if self._gpu is not None:
            return self._gpu, []
        total = sum(size for _, size in self._runs)
        file = os.memfd_create("thaw-lent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if total:
                os.posix_fallocate(file, 0, total)
            for address, size in self._runs:
                for at in range(0, size, _STEP):
                    part = min(_STEP, size - at)
                    _write(file, (ctypes.c_ubyte * part).from_address(address + at))
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(file)
            raise StorageError(f"{total / 1e9:.1f} GB of memory to lend cannot be had: {error.strerror}") from None
        return {"bytes": total}, [file]


def _write(file: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(file, view) :]


def _exported(context: Context, runs: Sequence[Run]) -> dict[str, Any]:
    """The allocations that runs lie in, a handle each, and where in them."""
    driver, numbers, handles, found = context.driver, dict[int, int](), list[str](), []
    for address, size in runs:
        base, whole = ADDRESS(), SIZE()
        driver.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(whole), address)
        if address + size > base.value + whole.value:
            raise DeviceError("a tensor reaches from one allocation of the driver's into the next")
        if base.value not in numbers:
            handle = IpcHandle()
            try:
                driver.call("cuIpcGetMemHandle", ctypes.byref(handle), base.value)
            except DeviceError as error:
                raise DeviceError(
                    f"the driver lends none of this memory ({error}), as none of vLLM's sleep mode and of PyTorch's "
                    "expandable segments; start without them"
                ) from None
            numbers[base.value] = len(handles)
            handles.append(bytes(handle.reserved).hex())
        found.append([numbers[base.value], address - base.value, size])
    return {"gpu": context.bus, "device": context.device, "handles": handles, "runs": found}


class BorrowedHost(MemorySource):
    """A lender's bytes in a memory file, as a source; owns the mapping until closed.

    Attributes:
        where, over: as of BorrowedGpu.
    """

    over: str | None

    def __init__(self, told: dict[str, Any], files: Sequence[int], places: Sequence[Run], name: str) -> None:
        """As ``borrow``."""
        total = sum(size for _, size in places)
        if len(files) != 1 or told.get("bytes") != total or os.fstat(files[0]).st_size != total:
            raise MismatchError(f"{name} are not as large as the snapshot says")
        if fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise MismatchError(f"{name} are in a file that may be cut off")
        self.where, self.over, self._places = "host memory", None, places
        self._held = mmap.mmap(files[0], total, mmap.MAP_SHARED, mmap.PROT_READ) if total else None
        super().__init__(memoryview(self._held) if self._held is not None else b"", name)
        self._begins = _begins(places)

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        copy(view, self._view[self._at(offset, len(view))])

    def view(self, offset: int, length: int) -> memoryview:
        """A range where it lies, to read; the caller releases it before ``close``.

        Raises:
            CorruptionError: it is not within one run.
        """
        return self._view[self._at(offset, length)]

    def _at(self, offset: int, length: int) -> slice:
        number = number_of(self._places, offset, length, self.name)
        begin = self._begins[number] + offset - self._places[number][0]
        return slice(begin, begin + length)

    def close(self) -> None:
        """Release and unmap; a second call does nothing."""
        super().close()
        held, self._held = self._held, None
        if held is not None:
            held.close()


Borrowed = BorrowedHost | BorrowedGpu


def borrow(
    told: dict[str, Any], files: Sequence[int], places: Sequence[Run], name: str, device: torch.device
) -> Borrowed:
    """A lender's runs as a source.

    Args:
        told, files: of ``Lent.told``; the files stay the caller's.
        places: where in the source each run is to be, and its bytes; in order.
        name: of the source.
        device: where its bytes will be copied to.

    Returns:
        Of a GPU's memory nothing is mapped yet: ``begin`` or ``map`` does it.

    Raises:
        MismatchError: they are another process's idea of these runs, or lie where they cannot be copied from; what came
            is no memory.
        DeviceError: they are not within reach.
    """
    if (device.type == "cpu") != ("bytes" in told):
        raise MismatchError(f"{name} are in {'the host' if 'bytes' in told else 'a GPU'}'s memory, the model is not")
    if device.type != "cpu" and not _sound(told):
        raise MismatchError(_OTHER_WORDS.format(name))
    return _borrowed(told, files, places, name, device.index or 0)


def borrow_whole(told: dict[str, Any], files: Sequence[int], name: str) -> Borrowed:
    """``borrow`` by who has no snapshot: all of a lender's runs one after the other, from 0 on, where they are.

    Loads no torch, which takes seconds.

    Raises:
        MismatchError, DeviceError: as ``borrow``.
    """
    if "bytes" in told:
        if type(told["bytes"]) is not int or told["bytes"] < 0:
            raise MismatchError(_OTHER_WORDS.format(name))
        return _borrowed(told, files, [(0, told["bytes"])], name, 0)
    if not _sound(told):
        raise MismatchError(_OTHER_WORDS.format(name))
    sizes = [size for _, _, size in told["runs"]]
    places = list(zip(_begins([(0, size) for size in sizes]), sizes, strict=True))
    found = _borrowed(told, files, places, name, device_at(told["gpu"]))
    assert isinstance(found, BorrowedGpu)
    try:
        found.map()
    except BaseException:
        found.close()
        raise
    return found


def _borrowed(told: dict[str, Any], files: Sequence[int], places: Sequence[Run], name: str, gpu: int) -> Borrowed:
    try:
        return BorrowedHost(told, files, places, name) if "bytes" in told else BorrowedGpu(told, places, name, gpu)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{name} cannot be borrowed as they are told of: {error}") from None


def _sound(told: dict[str, Any]) -> bool:
    """Whether it has the parts of ``_exported``'s."""
    handles, runs = told.get("handles"), told.get("runs")
    return (
        isinstance(told.get("gpu"), str)
        and _BUS.fullmatch(told["gpu"]) is not None
        and type(told.get("device")) is int
        and isinstance(handles, list)
        and all(isinstance(one, str) and len(one) == 128 and not set(one) - set("0123456789abcdef") for one in handles)
        and isinstance(runs, list)
        and all(
            isinstance(run, list) and len(run) == 3 and all(type(value) is int and value >= 0 for value in run)
            for run in runs
        )
        and all(run[0] < len(handles) for run in runs)
    )


def _begins(places: Sequence[Run]) -> list[int]:
    """Where runs begin that lie one after the other."""
    found, end = [], 0
    for _, size in places:
        found.append(end)
        end += size
    return found
