"""Memory of one process from which another of the same host copies, without the host's memory or a disk in between.

On NVIDIA GPUs the borrower maps the lender's allocations (CUDA's interprocess handles, as ``shared``) and copies from
them: on one GPU within its memory, between two over NVLink or PCI Express. It maps them in its own context, with peer
access as it is first used, so that nothing of it appears on the other GPU. On the host the lender writes its bytes to a
sealed memory file and passes its descriptor.

The lender's memory must stay what and where it is as long as somebody borrows it; ``offers`` sees to that.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CorruptionError, DeviceError, MismatchError, StorageError
from .cuda import ADDRESS, LAZILY, SIZE, Context, IpcHandle, Stream, device_at
from .links import by_driver
from .pipeline import Range
from .source import MemorySource, copy
from .straight import send
from .wordsum_cuda import Kernel

if TYPE_CHECKING:
    import torch

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What a borrower asks of a memory file: reading beyond the end of one that was cut off would end its process."""
_STREAMS = 4
"""On which copies take turns: one copy between two GPUs may leave room for another."""
_STEP = 16 << 20
"""Bytes that the lender writes to a memory file at a time."""
_OTHER_WORDS = "{} are told of in other words; is the other process of another version of thaw?"
_BUS = re.compile(r"[0-9a-f:.]{1,32}")

Run = tuple[int, int]
"""Address and bytes."""


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
        for at, size in _pieces(self._places, self._begins, offset, len(view), self.name):
            copy(view, self._view[at : at + size])

    def view(self, offset: int, length: int) -> memoryview:
        """A range where it lies, to read; the caller releases it before ``close``.

        Raises:
            CorruptionError: it is not within one run.
        """
        ((at, size),) = _pieces(self._places, self._begins, offset, length, self.name)
        return self._view[at : at + size]

    def close(self) -> None:
        """Release and unmap; a second call does nothing."""
        super().close()
        held, self._held = self._held, None
        if held is not None:
            held.close()


class BorrowedGpu:
    """A lender's allocations on a GPU, mapped, as a source; owns the mappings until closed.

    Attributes:
        where: which memory, as the lender calls it.
        over: what lies between; None within one memory.
    """

    over: str | None

    def __init__(self, told: dict[str, Any], places: Sequence[Run], name: str, device: torch.device) -> None:
        """As ``borrow``."""
        self.name, self.size = name, max((at + size for at, size in places), default=0)
        handles, runs, bus = told["handles"], told["runs"], told["gpu"]
        if [size for _, _, size in runs] != [size for _, size in places]:
            raise MismatchError(f"{name} are not as large as the snapshot says")
        self._places, self._context, self._mapped = places, Context(device.index or 0), list[int]()
        try:
            self.where = f"cuda:{told['device']}"
            self.over = None if bus == self._context.bus else self._context.reaches(bus) or "peer access"
            with self._context.entered():
                for handle in handles:
                    made = IpcHandle.from_buffer_copy(bytes.fromhex(handle))
                    self._mapped.append(self._context.driver.made("cuIpcOpenMemHandle_v2", made, LAZILY))
                ends = [_end(self._context, address) for address in self._mapped]
            if any(self._mapped[number] + at + size > ends[number] for number, at, size in runs):
                raise MismatchError(f"{name} reach beyond the memory that is lent")
            self._begins = [self._mapped[number] + at for number, at, _ in runs]
        except BaseException:
            self.close()
            raise

    def pieces(self, offset: int, length: int) -> list[Run]:
        """Where a range of this source lies, mapped."""
        return _pieces(self._places, self._begins, offset, length, self.name)

    def cuts(self, offset: int, length: int) -> Iterator[Run]:
        """A range as parts that each are within one run: offset and length."""
        while length > 0:
            number = bisect.bisect_right(self._places, offset, key=lambda place: place[0]) - 1
            size = min(length, sum(self._places[number]) - offset) if number >= 0 else 0
            if size <= 0:
                raise CorruptionError(f"{self.name} have no {length} bytes at {offset}")
            yield offset, size
            offset, length = offset + size, length - size

    def read_into(self, offset: int, view: memoryview) -> None:
        """See Source."""
        into = ctypes.addressof((ctypes.c_ubyte * len(view)).from_buffer(view)) if len(view) else 0
        with self._context.entered():
            stream = Stream(self._context)
            try:
                for address, size in self.pieces(offset, len(view)):
                    self._context.driver.call("cuMemcpyDtoHAsync_v2", into, address, size, stream.handle)
            finally:
                stream.close()

    def send(
        self,
        context: Context,
        ranges: Sequence[Range],
        runs: Sequence[Run],
        *,
        verify: bool,
        kernel: Kernel | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy ranges to this process's GPU, and check them there; see ``straight.send``."""
        how: dict[str, Any] = {"verify": verify, "kernel": kernel, "streams": _STREAMS, "progress": progress}
        send(context, self.name, ranges, runs, self.pieces, "cuMemcpyDtoDAsync_v2", **how)

    def check_unchanged(self) -> None:
        """See Source; sums tell."""

    def close(self) -> None:
        """Unmap; nothing may be copying. A second call does nothing."""
        if self._mapped:
            with self._context.entered():
                while self._mapped:
                    self._context.driver["cuIpcCloseMemHandle"](self._mapped.pop())
        self._context.close()


def _end(context: Context, address: int) -> float:
    """Where the allocation ends that an address lies in; the calling thread has entered the context.

    CUDA's manual does not say that the driver tells it of another process's memory; where it does not, that is unknown.
    """
    base, whole = ADDRESS(), SIZE()
    refused = context.driver["cuMemGetAddressRange_v2"](ctypes.byref(base), ctypes.byref(whole), address)
    return math.inf if refused else base.value + whole.value


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

    Raises:
        MismatchError: they are another process's idea of these runs, or lie where they cannot be copied from; what came
            is no memory.
        DeviceError: they cannot be mapped.
    """
    if (device.type == "cpu") != ("bytes" in told):
        raise MismatchError(f"{name} are in {'the host' if 'bytes' in told else 'a GPU'}'s memory, the model is not")
    try:
        if device.type == "cpu":
            return BorrowedHost(told, files, places, name)
        if not _sound(told):
            raise MismatchError(_OTHER_WORDS.format(name))
        return BorrowedGpu(told, places, name, device)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{name} cannot be borrowed as they are told of: {error}") from None


def borrow_whole(told: dict[str, Any], files: Sequence[int], name: str) -> Borrowed:
    """``borrow`` by who has no snapshot: all of a lender's runs one after the other, from 0 on, where they are.

    Raises:
        MismatchError, DeviceError: as ``borrow``.
    """
    import torch

    if "bytes" in told:
        if type(told["bytes"]) is not int or told["bytes"] < 0:
            raise MismatchError(_OTHER_WORDS.format(name))
        return borrow(told, files, [(0, told["bytes"])], name, torch.device("cpu"))
    if not _sound(told):
        raise MismatchError(_OTHER_WORDS.format(name))
    sizes = [size for _, _, size in told["runs"]]
    places = list(zip(_begins([(0, size) for size in sizes]), sizes, strict=True))
    return borrow(told, files, places, name, torch.device("cuda", device_at(told["gpu"])))


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


def _pieces(places: Sequence[Run], begins: Sequence[int], offset: int, length: int, name: str) -> list[Run]:
    """Where a range lies, of runs that begin there; it is within one of them."""
    number = bisect.bisect_right(places, offset, key=lambda place: place[0]) - 1
    if number >= 0 and offset + length <= sum(places[number]):
        return [(begins[number] + offset - places[number][0], length)]
    raise CorruptionError(f"{name} have no {length} bytes at {offset}")
