"""The word sums of chunks that are in a GPU's memory, by one small kernel for many chunks at once.

The kernel is a text in PTX, NVIDIA's documented assembly, that the driver translates in some 10 ms and keeps in its own
cache. Triton's first launch in a process takes 0.5 s with warm caches and 1.8 s without (H100, Triton 3.6); the same
sum spelt in torch's operations passes over memory ten times and is launched six times a chunk. Both take longer than
the bytes take to arrive. ``tests/gpu`` holds the kernel against ``checksum.wordsum`` for any length and alignment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .checksum import LANES
from .cuda import ADDRESS, Context, Stream

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_THREADS = 256
_BLOCK = _THREADS * 4
"""Lanes of one block of threads; each thread has four neighbouring lanes and walks down the rows of a chunk."""
_BITS = (1 << 64) - 1


def _weight(target: str, state: str) -> str:
    """SplitMix64's finaliser of ``state`` with its lowest bit set (docs/format.md, section 6)."""
    lines = [f"mov.u64 {target}, {state};"]
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1]), (31, None)):
        lines += [f"shr.u64 %t, {target}, {shift};", f"xor.b64 {target}, {target}, %t;"]
        if factor is not None:
            lines.append(f"mul.lo.u64 {target}, {target}, {factor - (factor >> 63 << 64)};")
    return "\n    ".join([*lines, f"or.b64 {target}, {target}, 1;"])


def _tail() -> str:
    """Four words byte by byte, zeros beyond the chunk's end: for its last bytes, and where it lies unaligned."""
    lines = [f"mov.u32 %x{word}, 0;" for word in range(4)]
    for byte in range(16):
        lines += [
            f"add.u64 %t, %offset, {byte};",
            "setp.lt.u64 %inside, %t, %length;",
            "add.u64 %t, %data, %t;",
            "mov.u32 %byte, 0;",
            "@%inside ld.global.u8 %byte, [%t];",
            f"shl.b32 %byte, %byte, {byte % 4 * 8};",
            f"or.b32 %x{byte // 4}, %x{byte // 4}, %byte;",
        ]
    return "\n    ".join(lines)


def _add() -> str:
    lines = []
    for word in range(4):
        lines += [f"cvt.u64.u32 %t, %x{word};", f"mad.lo.u64 %sum{word}, %t, %weight, %sum{word};"]
    return "\n    ".join(lines)


def _lanes() -> str:
    """The four columns' sums times their lanes' weights, added up in %sum0."""
    lines = ["add.u32 %x0, %lane, 1;", "cvt.u64.u32 %state, %x0;", f"mul.lo.u64 %state, %state, {_GOLDEN - (1 << 64)};"]
    for word in range(4):
        lines += [_weight("%weight", "%state"), f"add.u64 %state, %state, {_GOLDEN - (1 << 64)};"]
        lines.append(f"mul.lo.u64 %sum{word}, %sum{word}, %weight;")
        if word:
            lines.append(f"add.u64 %sum0, %sum0, %sum{word};")
    return "\n    ".join(lines)


def _across() -> str:
    """The sum over the warp's 32 threads, in its first."""
    lines = []
    for distance in (16, 8, 4, 2, 1):
        lines += [
            "mov.b64 {%x0, %x1}, %sum0;",
            f"shfl.sync.down.b32 %x2, %x0, {distance}, 31, -1;",
            f"shfl.sync.down.b32 %x3, %x1, {distance}, 31, -1;",
            "mov.b64 %t, {%x2, %x3};",
            "add.u64 %sum0, %sum0, %t;",
        ]
    return "\n    ".join(lines)


def source() -> bytes:
    """The kernel ``wordsum(chunks, sums)``; grid (chunks, LANES / 1024), 256 threads a block.

    ``chunks`` holds an address and a length for each, two 64-bit integers; ``sums`` a 64-bit integer that is added to.
    """
    first_row = (LANES + 1) * _GOLDEN & _BITS
    return f"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry wordsum(.param .u64 chunks, .param .u64 sums)
{{
    .reg .pred %inside, %aligned, %first;
    .reg .b32 %x<4>, %byte, %lane, %thread, %block;
    .reg .b64 %t, %data, %length, %offset, %end, %entry, %out, %seed, %state, %weight, %sum<4>;
    mov.u32 %block, %ctaid.x;
    ld.param.u64 %entry, [chunks];
    mul.wide.u32 %t, %block, 16;
    add.u64 %entry, %entry, %t;
    ld.global.u64 %data, [%entry];
    ld.global.u64 %length, [%entry+8];
    ld.param.u64 %out, [sums];
    mul.wide.u32 %t, %block, 8;
    add.u64 %out, %out, %t;
    and.b64 %t, %data, 15;
    setp.eq.u64 %aligned, %t, 0;
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.y;
    mul.lo.u32 %lane, %block, {_BLOCK};
    shl.b32 %byte, %thread, 2;
    add.u32 %lane, %lane, %byte;
    mul.wide.u32 %offset, %lane, 4;
    mov.u64 %sum0, 0;
    mov.u64 %sum1, 0;
    mov.u64 %sum2, 0;
    mov.u64 %sum3, 0;
    mov.u64 %seed, {first_row - (first_row >> 63 << 64)};
row:
    setp.ge.u64 %inside, %offset, %length;
    @%inside bra done;
    {_weight("%weight", "%seed")}
    add.u64 %end, %offset, 16;
    setp.le.and.u64 %inside, %end, %length, %aligned;
    @!%inside bra bytewise;
    add.u64 %t, %data, %offset;
    ld.global.v4.u32 {{%x0, %x1, %x2, %x3}}, [%t];
    bra add;
bytewise:
    {_tail()}
add:
    {_add()}
    add.u64 %offset, %offset, {LANES * 4};
    add.u64 %seed, %seed, {_GOLDEN - (1 << 64)};
    bra row;
done:
    {_lanes()}
    {_across()}
    and.b32 %thread, %thread, 31;
    setp.eq.u32 %first, %thread, 0;
    @%first red.global.add.u64 [%out], %sum0;
    ret;
}}
""".encode()


class Kernel:
    """The kernel on one GPU; owns a reference to its context until closed.

    Attributes:
        device: which GPU.
    """

    def __init__(self, device: int) -> None:
        """
        Args:
            device: ordinal, as torch counts.

        Raises:
            DeviceError: the driver does not take it.
        """
        self.device, self._context = device, Context(device)
        self._module = 0
        try:
            with self._context.entered():
                self._module = self._context.driver.made("cuModuleLoadData", source())
                self.function = self._context.driver.made("cuModuleGetFunction", self._module, b"wordsum")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unload it; nothing may be running. A second call does nothing."""
        module, self._module = self._module, 0
        if module:
            with self._context.entered():
                self._context.driver["cuModuleUnload"](module)
        self._context.close()


class CudaSums:
    """Sums of up to ``count`` runs of bytes on one GPU, asked for in groups; one thread, which entered the context.

    Owns a stream and a little device memory of its own (24 bytes a run, from the driver, so that no allocator of torch
    or of an engine sees it) until closed.
    """

    def __init__(self, context: Context, count: int, kernel: Kernel | None = None) -> None:
        """
        Args:
            context: of the GPU.
            count: runs at most.
            kernel: on this GPU, borrowed; None loads it. That waits for copies that are under way on any stream.

        Raises:
            DeviceError: no memory, or the driver does not take the kernel.
        """
        self._driver, self._count, self._asked = context.driver, count, 0
        self._memory = 0
        self._own: Kernel | None = None
        self._tables: list[Any] = []
        self._stream = Stream(context)
        try:
            if kernel is None:
                kernel = self._own = Kernel(context.device)
            self._kernel = kernel.function
            memory = ADDRESS()
            self._driver.call("cuMemAlloc_v2", ctypes.byref(memory), count * 24)
            self._memory = memory.value
            self._sums = self._memory + count * 16
            self._driver.call("cuMemsetD8Async", self._sums, 0, count * 8, self._stream.handle)
        except BaseException:
            self.close()
            raise

    def after(self, event: int) -> None:
        """Let what is asked for from now on wait for an event of another stream."""
        self._driver.call("cuStreamWaitEvent", self._stream.handle, event, 0)

    def add(self, runs: Sequence[tuple[int, int]]) -> None:
        """Ask for the sums of runs, each an address and a length; their bytes have arrived and stay."""
        if not runs:
            return
        if self._asked + len(runs) > self._count:
            raise ValueError(f"{self._count} sums were announced, {self._asked + len(runs)} are asked for")
        table = (ADDRESS * (2 * len(runs)))(*[number for run in runs for number in run])
        at, out = self._memory + self._asked * 16, self._sums + self._asked * 8
        call, stream = self._driver.call, self._stream.handle
        # Kept: GPUs that read the host's pages as they are may not have taken the bytes when the call returns.
        self._tables.append(table)
        call("cuMemcpyHtoDAsync_v2", at, ctypes.addressof(table), ctypes.sizeof(table), stream)
        grid = len(runs), LANES // _BLOCK
        self._driver.launch(self._kernel, grid, _THREADS, [ADDRESS(at), ADDRESS(out)], stream)
        self._asked += len(runs)

    def results(self) -> list[int]:
        """Every sum, in the order in which they were asked for; waits for them."""
        found = (ADDRESS * self._asked)()
        if self._asked:
            self._stream.synchronize()
            size = ctypes.sizeof(found)
            self._driver.call("cuMemcpyDtoHAsync_v2", ctypes.addressof(found), self._sums, size, self._stream.handle)
            self._stream.synchronize()
        return list(found)

    def close(self) -> None:
        """Wait and let go of everything; a second call does nothing."""
        self._stream.close()
        memory, self._memory = self._memory, 0
        if memory:
            self._driver["cuMemFree_v2"](memory)
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> CudaSums:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
