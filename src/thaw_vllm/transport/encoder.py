"""Chunks in a GPU's memory to the frames that ``codecs.planes.encode`` makes of them, in the host's.

The GPU counts bytes, codes planes and puts their words together (``planes_encode_cuda``); the processor decides how to
cut a chunk, makes the frequencies, and lays the frame out, all of which is short.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..codecs.planes import (
    ALIGN,
    BLOCK,
    HEAD,
    LANES,
    ROW,
    Counts,
    Cut,
    Frame,
    Numbers,
    Words,
    cut,
    cuts,
    framed,
    frequencies,
    gaps,
    runs,
)
from ..errors import DeviceError
from .cuda import ADDRESS, UINT, Context, Driver
from .planes_encode_cuda import ENTRIES, THREADS, WARPS, source
from .staging import address_of

ROOM = 256 << 20
"""Bytes of device memory at most for what is being encoded, but enough for one chunk: each takes three times its length
for half a millisecond, so that few at once keep the link busy."""
RESERVE = 1 << 30
"""Bytes of device memory that are left to others: an engine's allocations of the moment, code that the driver loads."""
_COUNTED = 64
"""Rows that a block of threads counts."""
_BINS = 4 * 4 * 256
"""Bytes of how often each byte occurs in four planes, uint32."""
_APART = 256
_PORTABLE, _MAPPED = 1, 2
"""CU_MEMHOSTREGISTER_PORTABLE and _DEVICEMAP."""


class Encoder:
    """Encodes on one GPU, several chunks at once, each in a thread; owns memory on both sides until closed."""

    def __init__(self, context: Context, longest: int, chunks: int, *, host: bool = False) -> None:
        """
        Args:
            context: of the GPU, borrowed.
            longest: bytes of the longest chunk.
            chunks: at once at most; fewer where ROOM or the GPU's free memory, less RESERVE, is not enough for them.
            host: whether ``encode_held`` will be called.

        Raises:
            DeviceError: not enough memory for one, or the driver does not take the kernels.
        """
        self._context, self._module = context, 0
        self._areas: list[_Area] = []
        self._spare: queue.SimpleQueue[_Area] = queue.SimpleQueue()
        driver = context.driver
        try:
            with context.entered():
                self._module = driver.made("cuModuleLoadData", source())
                functions = {name: driver.made("cuModuleGetFunction", self._module, name.encode()) for name in ENTRIES}
                places = _places(longest, host=host)
                there = (context.free() - RESERVE) // places[-1]
                if there < 1:
                    raise DeviceError("too little of the GPU's memory is free to compress by it")
                for _ in range(min(max(1, min(chunks, ROOM // places[-1])), there)):
                    try:
                        self._areas.append(_Area(driver, functions, places))
                    except DeviceError:
                        if not self._areas:
                            raise
                        break
        except BaseException:
            self.close()
            raise
        for area in self._areas:
            self._spare.put(area)

    @staticmethod
    def takes(address: int) -> bool:
        """Whether a chunk may lie there: four elements are read at once."""
        return address % ALIGN == 0

    def encode(self, address: int, length: int, width: int, out: memoryview, stream: int) -> int | None:
        """A chunk's frame into ``out``; returns its length. None, and ``out`` as it was, where it gains too little.

        The calling thread has entered the context. What is asked of the stream has ended when this returns.

        Args:
            address: of the chunk; see ``takes``.
            length: its bytes.
            width: see ``planes.encode``.
            out: ``length`` bytes at least; the GPU writes to it faster where it is page-locked.
            stream: a stream's handle.

        Raises:
            DeviceError.
        """
        return self._encode(address, None, length, width, out, stream)

    def encode_held(self, held: memoryview, width: int, stream: int) -> int | None:
        """The same of a chunk in the host's memory, whose place its frame takes."""
        return self._encode(0, held, len(held), width, held, stream)

    def _encode(
        self, address: int, held: memoryview | None, length: int, width: int, out: memoryview, stream: int
    ) -> int | None:
        if not cuts(length, width):
            return None  # before anything is asked of the stream, for which nobody would wait
        area = self._spare.get()
        try:
            if held is not None:
                address = area.chunk
                area.driver.call("cuMemcpyHtoDAsync_v2", address, address_of(held), length, stream)
            return _Chunk(area, address, length, stream).encode(width, out)
        except BaseException:
            with contextlib.suppress(DeviceError):  # the area is nobody else's before all has ended
                area.driver.call("cuStreamSynchronize", stream)
            raise
        finally:
            self._spare.put(area)

    def close(self) -> None:
        """Let go of everything; nothing may be under way. A second call does nothing."""
        areas, self._areas = self._areas, []
        module, self._module = self._module, 0
        if module:
            with self._context.entered(), contextlib.ExitStack() as stack:
                stack.callback(self._context.driver["cuModuleUnload"], module)
                for area in areas:
                    stack.callback(area.close)


def _blocks(longest: int) -> int:
    """Of all planes of a chunk together, at most."""
    return longest // BLOCK + 4


def _places(longest: int, *, host: bool = False) -> list[int]:
    """Where an area's parts begin, and where the last one ends; the first four exist in the host's memory as well."""
    blocks = _blocks(longest)
    places = [0]
    parts = (4 * _BINS, _BINS, 4 * blocks, 4 * blocks, 4 * LANES * blocks, 2 * BLOCK * blocks, longest)
    for size in (*parts, longest if host else 0):
        places.append(places[-1] + -(-size // _APART) * _APART)
    return places


class _Area:
    """Memory for one chunk, owned until closed.

    Attributes:
        bins: address of how often each byte occurs, by four ways to count; as all before ``states`` uint32 in both
            memories.
        tables: of a byte's frequency, and 65,536 times where its range begins.
        sizes: words of each block.
        ends: of each block's words among a plane's.
        states: of coders, uint32.
        words: a place of BLOCK uint16 for each block.
        parts: of the frame, each where it lies in it.
        chunk: a copy, where it comes from the host.
    """

    def __init__(self, driver: Driver, functions: dict[str, int], places: list[int]) -> None:
        self.driver, self.functions = driver, functions
        self._device = self._locked = self._seen = 0
        self._memory = mmap.mmap(-1, -(-places[4] // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._host = memoryview(self._memory)
        self._address = address_of(self._host)
        try:
            self._device = driver.made("cuMemAlloc_v2", places[-1])
            with contextlib.suppress(DeviceError):  # where locking is forbidden the driver copies by its own memory
                driver.call("cuMemHostRegister_v2", self._address, len(self._host), _PORTABLE | _MAPPED)
                self._locked = self._address
                self._seen = driver.made("cuMemHostGetDevicePointer_v2", self._locked, 0)
        except BaseException:
            self.close()
            raise
        starts = [self._device + at for at in places]
        self.bins, self.tables, self.sizes, self.ends, self.states, self.words, self.parts, self.chunk, _ = starts

    def fetched(self, at: int, count: int, stream: int) -> Numbers:
        """Numbers at an address of one of the first four parts; waits for them.

        By a kernel, if it sees the host's memory: a copy would wait until what other threads bring has been copied.
        """
        offset = at - self._device
        if self._seen:
            values = [ADDRESS(at), ADDRESS(self._seen + offset), UINT(count)]
            self.driver.launch(self.functions["move"], [-(-count // THREADS)], THREADS, values, stream)
        else:
            self.driver.call("cuMemcpyDtoHAsync_v2", self._address + offset, at, 4 * count, stream)
        self.driver.call("cuStreamSynchronize", stream)
        numbers: Numbers = np.frombuffer(self._host, np.uint32, count, offset).copy()
        return numbers

    def give(self, at: int, numbers: Numbers, stream: int) -> None:
        """The other way, without waiting."""
        offset, size = at - self._device, numbers.nbytes
        self._host[offset : offset + size] = numbers.tobytes()
        self.driver.call("cuMemcpyHtoDAsync_v2", at, self._address + offset, size, stream)

    def close(self) -> None:
        """Free it."""
        if self._locked:
            self.driver["cuMemHostUnregister"](self._locked)
        if self._device:
            self.driver["cuMemFree_v2"](self._device)
        self._host.release()
        self._memory.close()


class _Chunk:
    """One on its way, in an area that is its own meanwhile."""

    def __init__(self, area: _Area, address: int, length: int, stream: int) -> None:
        self._area, self._address, self._length, self._stream = area, address, length, stream

    def encode(self, width: int, out: memoryview) -> int | None:
        """See Encoder.

        It waits for the GPU three times, since each time the thread has to get the interpreter's lock again, which
        takes 100 µs where many want it: that is what an encoder is limited by.
        """
        looks = cuts(self._length, width)
        sampled, counts = self._counted(looks)
        how = cut(self._length, width, lambda wide, turn: sampled[wide, turn])
        if how is None:
            return None
        if (how.width, how.turn) != looks[-1]:
            counts = self._counted([(how.width, how.turn)])[1]
        tables = {plane: frequencies(counts[plane]) for plane in how.coded}
        ends = self._coded(how, tables)
        frame = framed(how, self._length, {plane: int(ends[plane][-1]) for plane in how.coded})
        if frame is None:
            return None
        self._gather(frame, ends, out)
        out[:HEAD] = frame.head()
        for plane in how.coded:
            place = frame.planes[plane]
            out[place.at : place.at + 512] = tables[plane].astype("<u2").tobytes()
            out[place.ends : place.ends + 4 * frame.blocks] = ends[plane].astype("<u4").tobytes()
        for low, high in gaps(frame):
            out[low:high] = bytes(high - low)
        return frame.size

    def _counted(self, looks: list[tuple[int, int]]) -> tuple[dict[tuple[int, int], Counts], Counts]:
        """How often each byte occurs in a sample of the chunk, by width and turn, and in all of it by the last of
        these."""
        area = self._area
        area.driver.call("cuMemsetD8Async", area.bins, 0, 4 * _BINS, self._stream)
        places = runs(self._length)
        run = places[0][1]
        for number, (width, turn) in enumerate(looks):
            whole = -(-self._rows(width) // _COUNTED), (_COUNTED * ROW * width, 1, _COUNTED)
            apart = len(places), (self._length - run, len(places) - 1, run // (ROW * width))
            self._count(number, width, turn, *(apart if len(places) > 1 else whole))
        self._count(3, width, turn, *whole)
        bins = area.fetched(area.bins, _BINS, self._stream).reshape(4, 4, 256).astype(np.int64)
        return {look: bins[number, : look[0]] for number, look in enumerate(looks)}, bins[3, :width]

    def _count(self, number: int, width: int, turn: int, grid: int, how: tuple[int, int, int]) -> None:
        """Args: how: see the kernel's span, parts and each."""
        span, parts, each = how
        numbers = [UINT(number) for number in (parts, each, self._rows(width), turn)]
        bins = ADDRESS(self._area.bins + number * _BINS)
        self._launch(f"count_{width}", grid, [ADDRESS(self._address), ADDRESS(span), *numbers, bins])

    def _rows(self, width: int) -> int:
        return self._length // (ROW * width)

    def _coded(self, how: Cut, tables: dict[int, Words]) -> dict[int, Numbers]:
        """Where the words of each plane's blocks end; the words are on the GPU."""
        area, rows = self._area, self._rows(how.width)
        blocks = -(-rows * ROW // BLOCK)
        packed = np.zeros((len(tables), 256), np.uint32)
        for row, table in zip(packed, tables.values(), strict=True):
            shares = table.astype(np.uint32)
            row[:] = np.where(shares > 0, shares | (np.cumsum(shares) - shares) << 16, 0)
        area.give(area.tables, packed, self._stream)
        for number, plane in enumerate(tables):
            numbers = [UINT(how.turn), UINT(8 * plane), ADDRESS(area.tables + 1024 * number), UINT(rows)]
            first = blocks * number
            places = area.words + 2 * BLOCK * first, area.sizes + 4 * first, area.states + 4 * LANES * first
            values = [ADDRESS(self._address), *numbers, *[ADDRESS(place) for place in places]]
            self._launch(f"encode_{how.width}", -(-blocks // WARPS), values)
        sizes = area.fetched(area.sizes, blocks * len(tables), self._stream).reshape(-1, blocks)
        return dict(zip(tables, np.cumsum(sizes, axis=1, dtype=np.uint32), strict=True))

    def _gather(self, frame: Frame, ends: dict[int, Numbers], out: memoryview) -> None:
        """What the GPU has of a frame to its places in ``out``."""
        area = self._area
        area.give(area.ends, np.concatenate([*ends.values()]), self._stream)
        first = 0
        for plane, place in enumerate(frame.planes):
            part = area.parts + place.at
            if not place.coded:
                numbers = [UINT(frame.turn), UINT(8 * plane), UINT(frame.elements // ROW)]
                values = [ADDRESS(self._address), *numbers, ADDRESS(part)]
                self._launch(f"plane_{frame.width}", -(-frame.elements // (ROW * WARPS)), values)
                self._fetch(out, place.at, part, frame.elements)
                continue
            words = area.words + 2 * BLOCK * first, area.ends + 4 * first, area.parts + place.words
            self._launch("pack", frame.blocks, [ADDRESS(address) for address in words])
            self._fetch(out, place.words, area.parts + place.words, 2 * place.count)
            self._fetch(out, place.states, area.states + 4 * LANES * first, 4 * LANES * frame.blocks)
            first += frame.blocks
        end = self._address + frame.elements * frame.width
        self._fetch(out, frame.tail, end, frame.size - frame.tail)
        area.driver.call("cuStreamSynchronize", self._stream)

    def _fetch(self, out: memoryview, at: int, source: int, size: int) -> None:
        if size:
            into = address_of(out) + at
            self._area.driver.call("cuMemcpyDtoHAsync_v2", into, source, size, self._stream)

    def _launch(self, name: str, grid: int, values: Sequence[Any]) -> None:
        self._area.driver.launch(self._area.functions[name], [grid], THREADS, values, self._stream)
