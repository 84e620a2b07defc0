"""Codec 1 (``codecs.planes``) undone on a GPU: a warp decodes a block, and puts its elements together on the way.

PTX, as the kernel of ``wordsum_cuda`` is, and for its reasons. A row is 128 elements, four neighbouring ones a thread,
so that every plane is read and every element written in whole lines. Whatever the words are, nothing outside of the
buffers that are named is read or written: what a hostile frame decodes to, its checksums tell.
"""

from __future__ import annotations

import contextlib
import threading

from ..codecs.planes import BITS, BLOCK, LANES, ROW, START, TOTAL, Frame, Plane
from .cuda import ADDRESS, UINT, Context

WARPS = 8
"""Blocks that one block of threads decodes; they share a table."""
_THREADS = WARPS * 32
LIKELIEST = 2, 1
"""Width and plane of the kernel that nearly every snapshot needs: bfloat16's."""


def _table() -> str:
    """Of 4096 entries, symbol | (frequency - 1) << 8 | place within it << 20: each warp those of 32 symbols."""
    scan = []
    for distance in (1, 2, 4, 8, 16):
        scan += [f"shfl.sync.up.b32 %x1|%p, %x0, {distance}, 0, -1;", "@%p add.u32 %x0, %x0, %x1;"]
    add = []
    for warp in range(WARPS - 1):
        add += [f"ld.shared.u32 %x2, [%shared+{4 * TOTAL + 4 * warp}];", f"setp.gt.u32 %p, %warp, {warp};"]
        add += ["@%p add.u32 %begin, %begin, %x2;"]
    lines = """
    mul.wide.u32 %t, %thread, 2;
    ld.param.u64 %u, [frequencies];
    add.u64 %t, %t, %u;
    ld.global.u16 %h, [%t];
    cvt.u32.u16 %mine, %h;
    mov.u32 %x0, %mine;
    {scan}
    sub.u32 %begin, %x0, %mine;
    shl.b32 %x1, %warp, 2;
    add.u32 %x1, %x1, %shared;
    setp.eq.u32 %p, %lane, 31;
    @%p st.shared.u32 [%x1+{sums}], %x0;
    bar.sync 0;
    {add}
    mov.u32 %symbol, 0;
symbols:
    shfl.sync.idx.b32 %x0, %mine, %symbol, 31, -1;
    shfl.sync.idx.b32 %x1, %begin, %symbol, 31, -1;
    shl.b32 %x2, %warp, 5;
    add.u32 %x2, %x2, %symbol;
    sub.u32 %x3, %x0, 1;
    shl.b32 %x3, %x3, 8;
    or.b32 %x2, %x2, %x3;
    mov.u32 %i, %lane;
slots:
    setp.ge.u32 %p, %i, %x0;
    @%p bra next;
    add.u32 %x3, %x1, %i;
    setp.ge.u32 %p, %x3, {total};
    @%p bra next;
    shl.b32 %x3, %x3, 2;
    add.u32 %x3, %x3, %shared;
    shl.b32 %x4, %i, 20;
    or.b32 %x4, %x4, %x2;
    st.shared.u32 [%x3], %x4;
    add.u32 %i, %i, 32;
    bra slots;
next:
    bar.warp.sync -1;
    add.u32 %symbol, %symbol, 1;
    setp.lt.u32 %p, %symbol, 32;
    @%p bra symbols;
    bar.sync 0;
"""
    return lines.format(scan="\n    ".join(scan), add="\n    ".join(add), sums=4 * TOTAL, total=TOTAL)


def _symbol(k: int) -> str:
    """The next one of this thread's coder, in ``%c{k}``; the coders take words in their order."""
    return f"""
    and.b32 %i, %state, {TOTAL - 1};
    shl.b32 %i, %i, 2;
    add.u32 %i, %i, %shared;
    ld.shared.u32 %x0, [%i];
    and.b32 %c{k}, %x0, 255;
    bfe.u32 %x1, %x0, 8, {BITS};
    add.u32 %x1, %x1, 1;
    shr.u32 %x2, %x0, 20;
    shr.u32 %i, %state, {BITS};
    mad.lo.u32 %state, %x1, %i, %x2;
    setp.lt.u32 %p, %state, {START};
    vote.sync.ballot.b32 %x0, %p, -1;
    and.b32 %x1, %x0, %below;
    popc.b32 %x1, %x1;
    add.u32 %x1, %x1, %at;
    min.u32 %x1, %x1, %last;
    mul.wide.u32 %t, %x1, 2;
    add.u64 %t, %t, %words;
    @%p ld.global.nc.u16 %h, [%t];
    @%p cvt.u32.u16 %x1, %h;
    @%p shl.b32 %state, %state, 16;
    @%p or.b32 %state, %state, %x1;
    popc.b32 %x0, %x0;
    add.u32 %at, %at, %x0;
"""


def _merged(width: int, plane: int) -> str:
    """Four elements out of the decoded plane and the others, turned back and stored at ``%out``."""
    if width == 1:
        packed = "prmt.b32 %c0, %c0, %c1, 0x0040; prmt.b32 %c2, %c2, %c3, 0x0040; prmt.b32 %c0, %c0, %c2, 0x5410;"
        return f"{packed}\n    st.global.u32 [%out], %c0;"
    lines = []
    for k in range(4):
        lines.append(f"shl.b32 %c{k}, %c{k}, {8 * plane};")
        for other in range(width):
            if other != plane:
                lines += [f"bfe.u32 %i, %r{other}, {8 * k}, 8;", f"shl.b32 %i, %i, {8 * other};"]
                lines += [f"or.b32 %c{k}, %c{k}, %i;"]
        if width == 2:  # twice, so that turning 32 bits turns 16
            lines += [f"prmt.b32 %c{k}, %c{k}, %c{k}, 0x1010;"]
        lines.append(f"shf.r.wrap.b32 %c{k}, %c{k}, %c{k}, %turn;")
    if width == 2:
        lines += ["prmt.b32 %c0, %c0, %c1, 0x5410;", "prmt.b32 %c2, %c2, %c3, 0x5410;"]
        lines.append("st.global.v2.u32 [%out], {%c0, %c2};")
    else:
        lines.append("st.global.v4.u32 [%out], {%c0, %c1, %c2, %c3};")
    return "\n    ".join(lines)


def _entry(width: int, plane: int) -> str:
    others = [number for number in range(width) if number != plane]
    addresses = [f"ld.param.u64 %p{n}, [plane{n}]; add.u64 %p{n}, %p{n}, %first;" for n in others]
    raw = [f"ld.global.nc.u32 %r{n}, [%p{n}]; add.u64 %p{n}, %p{n}, {ROW};" for n in others]
    line = "\n    "
    return f"""
.visible .entry planes_{width}_{plane}(
    .param .u64 frequencies, .param .u64 ends, .param .u64 states, .param .u64 words, .param .u32 count,
    .param .u64 plane0, .param .u64 plane1, .param .u64 plane2, .param .u64 plane3,
    .param .u32 turn, .param .u32 rows, .param .u64 out)
{{
    .shared .align 16 .b8 table[{4 * TOTAL + 4 * WARPS}];
    .reg .pred %p;
    .reg .b16 %h;
    .reg .b32 %i, %x<5>, %c<4>, %r<4>, %state, %at, %last, %below, %shared, %lane, %warp, %thread, %block, %rows;
    .reg .b32 %mine, %begin, %symbol, %turn;
    .reg .b64 %t, %u, %words, %out, %first, %p<4>;
    mov.u32 %shared, table;
    mov.u32 %thread, %tid.x;
    and.b32 %lane, %thread, 31;
    shr.u32 %warp, %thread, 5;
    mov.u32 %below, %lanemask_lt;
    {_table()}
    mov.u32 %block, %ctaid.x;
    mad.lo.u32 %block, %block, {WARPS}, %warp;
    ld.param.u32 %rows, [rows];
    mul.lo.u32 %x0, %block, {BLOCK // ROW};
    setp.ge.u32 %p, %x0, %rows;
    @%p bra done;
    sub.u32 %rows, %rows, %x0;
    min.u32 %rows, %rows, {BLOCK // ROW};
    ld.param.u64 %u, [states];
    mad.lo.u32 %x0, %block, {LANES}, %lane;
    mul.wide.u32 %t, %x0, 4;
    add.u64 %t, %t, %u;
    ld.global.u32 %state, [%t];
    mov.u32 %at, 0;
    setp.eq.u32 %p, %block, 0;
    ld.param.u64 %u, [ends];
    mul.wide.u32 %t, %block, 4;
    add.u64 %t, %t, %u;
    @!%p ld.global.u32 %at, [%t+-4];
    ld.param.u64 %words, [words];
    ld.param.u32 %last, [count];
    sub.u32 %last, %last, 1;
    ld.param.u32 %turn, [turn];
    mul.wide.u32 %first, %block, {BLOCK};
    mul.wide.u32 %t, %lane, 4;
    add.u64 %first, %first, %t;
    ld.param.u64 %out, [out];
    mul.lo.u64 %t, %first, {width};
    add.u64 %out, %out, %t;
    {line.join(addresses)}
row:
    {line.join(raw)}
    {"".join(_symbol(k) for k in range(4))}
    {_merged(width, plane)}
    add.u64 %out, %out, {ROW * width};
    sub.u32 %rows, %rows, 1;
    setp.ne.u32 %p, %rows, 0;
    @%p bra row;
done:
    ret;
}}
"""


def source(width: int, plane: int) -> bytes:
    """The kernel ``planes_WIDTH_PLANE``; grid: blocks / WARPS, 256 threads a block. One module each, since translating
    it is what takes time, and nearly every snapshot needs the one of bfloat16 alone."""
    return f".version 7.0\n.target sm_70\n.address_size 64\n{_entry(width, plane)}".encode()


class PlaneKernels:
    """The kernels on one GPU, each loaded when it is first needed; owns a reference to its context until closed."""

    def __init__(self, device: int) -> None:
        """
        Args:
            device: ordinal, as torch counts.
        """
        self._context = Context(device)
        self._lock = threading.Lock()
        self._loaded: dict[tuple[int, int], tuple[int, int]] = {}

    def load(self, width: int, plane: int) -> int:
        """The function; translated by the driver at first, some 40 ms, which its own cache may spare.

        Raises:
            DeviceError: the driver does not take it.
        """
        with self._lock:
            if (width, plane) not in self._loaded:
                with self._context.entered():
                    module = self._context.driver.made("cuModuleLoadData", source(width, plane))
                    name = f"planes_{width}_{plane}".encode()
                    self._loaded[width, plane] = module, 0
                    self._loaded[width, plane] = module, self._context.driver.made("cuModuleGetFunction", module, name)
            return self._loaded[width, plane][1]

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Make the GPU's context the calling thread's meanwhile."""
        return self._context.entered()

    def decode(self, frame: Frame, stored: int, planes: int, out: int, stream: int) -> None:
        """Ask for a frame to be decoded. The caller has entered the context.

        Args:
            stored: address of the frame, aligned to ALIGN.
            planes: address of room for ``room(frame)`` bytes, aligned likewise.
            out: address of the original bytes, aligned to 16.
            stream: the stream's handle.

        Raises:
            DeviceError.
        """
        driver = self._context.driver
        coded = [number for number, place in enumerate(frame.planes) if place.coded]
        addresses = [stored + place.at for place in frame.planes]
        for number in coded[:-1]:
            self._launch(frame, frame.planes[number], stored, 1, 0, [0], 0, planes, stream)
            addresses[number] = planes
            planes += frame.elements
        last = coded[-1]
        self._launch(frame, frame.planes[last], stored, frame.width, last, addresses, frame.turn, out, stream)
        whole = frame.elements * frame.width
        if frame.size > frame.tail:
            driver.call("cuMemcpyDtoDAsync_v2", out + whole, stored + frame.tail, frame.size - frame.tail, stream)

    def _launch(
        self,
        frame: Frame,
        place: Plane,
        stored: int,
        width: int,
        plane: int,
        addresses: list[int],
        turn: int,
        out: int,
        stream: int,
    ) -> None:
        # Where there are no words none is read, but a hostile frame's states may ask for one.
        words, count = (place.words, place.count) if place.count else (place.states, 1)
        values = [
            *[ADDRESS(stored + at) for at in (place.at, place.ends, place.states, words)],
            UINT(count),
            *[ADDRESS(address) for address in [*addresses, 0, 0, 0][:4]],
            UINT(turn),
            UINT(frame.elements // ROW),
            ADDRESS(out),
        ]
        grid = [-(-frame.blocks // WARPS)]
        self._context.driver.launch(self.load(width, plane), grid, _THREADS, values, stream)

    def close(self) -> None:
        """Unload them; nothing may be running. A second call does nothing."""
        loaded, self._loaded = self._loaded, {}
        if loaded:
            with self._context.entered():
                for module, _ in loaded.values():
                    self._context.driver["cuModuleUnload"](module)
        self._context.close()


def room(frame: Frame) -> int:
    """Bytes that decoding takes beside the frame and what it becomes: for coded planes but the last."""
    return (sum(place.coded for place in frame.planes) - 1) * frame.elements
