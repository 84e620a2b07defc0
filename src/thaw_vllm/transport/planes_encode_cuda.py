"""Codec 1 (``codecs.planes``) made on a GPU: the kernels that ``encoder`` puts together.

PTX, for ``wordsum_cuda``'s reasons. A warp encodes a block, from its last row to its first, into a place of its own,
one coder a thread as when it is decoded; how long each is, the processor adds up, and a second kernel puts them one
after another. As in ``planes_cuda`` a row is 128 elements, four neighbouring ones a thread.
"""

from __future__ import annotations

from ..codecs.planes import BITS, BLOCK, LANES, ROW, START, WIDTHS

WARPS = 8
"""Of a block of threads: each encodes a block of a plane, copies a row, or counts every eighth one."""
THREADS = WARPS * 32
_REGISTERS = """
    .reg .pred %p, %q;
    .reg .b16 %h;
    .reg .b32 %i, %n, %e, %r<4>, %x<4>, %state, %at, %below, %shared, %lane, %warp, %thread, %rows, %turn, %shift;
    .reg .b64 %t, %u, %data, %out;
    mov.u32 %thread, %tid.x;
    and.b32 %lane, %thread, 31;
    shr.u32 %warp, %thread, 5;
"""


def _load(width: int) -> str:
    """This thread's four elements, at ``%data``."""
    kind, into = {1: ("u32", "%r0"), 2: ("v2.u32", "{%r0, %r1}"), 4: ("v4.u32", "{%r0, %r1, %r2, %r3}")}[width]
    return f"ld.global.{kind} {into}, [%data];"


def _element(width: int, k: int) -> str:
    """The k-th of them in ``%e``, turned."""
    if width == 1:
        return f"bfe.u32 %e, %r0, {8 * k}, 8;"
    if width == 2:  # twice, so that turning 32 bits turns 16
        return f"prmt.b32 %e, %r{k // 2}, %r{k // 2}, {'0x3232' if k % 2 else '0x1010'};\n    {_TURN}"
    return f"mov.u32 %e, %r{k};\n    {_TURN}"


_TURN = "shf.l.wrap.b32 %e, %e, %e, %turn;"


def _count(width: int) -> str:
    """Runs of rows, one a block of threads: block n's begins at span * n / parts bytes, rounded down to 512."""
    tally = []
    for k in range(4):
        tally.append(_element(width, k))
        for plane in range(width):
            tally += [f"bfe.u32 %i, %e, {8 * plane}, 8;", "shl.b32 %i, %i, 2;", "add.u32 %i, %i, %shared;"]
            tally.append(f"red.shared.add.u32 [%i+{1024 * plane}], 1;")
    clear = [f"st.shared.u32 [%at+{1024 * plane}], 0;" for plane in range(width)]
    give = []
    for plane in range(width):
        give += [f"ld.shared.u32 %i, [%at+{1024 * plane}];", f"red.global.add.u32 [%out+{1024 * plane}], %i;"]
    line = "\n    "
    return f"""
.visible .entry count_{width}(
    .param .u64 data, .param .u64 span, .param .u32 parts, .param .u32 each, .param .u32 rows, .param .u32 turn,
    .param .u64 counts)
{{
    .shared .align 4 .b8 bins[{1024 * width}];
    {_REGISTERS}
    mov.u32 %shared, bins;
    shl.b32 %at, %thread, 2;
    add.u32 %at, %at, %shared;
    {line.join(clear)}
    bar.sync 0;
    mov.u32 %i, %ctaid.x;
    cvt.u64.u32 %t, %i;
    ld.param.u64 %u, [span];
    mul.lo.u64 %t, %t, %u;
    ld.param.u32 %i, [parts];
    cvt.u64.u32 %u, %i;
    div.u64 %t, %t, %u;
    and.b64 %t, %t, -512;
    ld.param.u64 %data, [data];
    add.u64 %data, %data, %t;
    shr.u64 %t, %t, {(ROW * width).bit_length() - 1};
    cvt.u32.u64 %i, %t;
    ld.param.u32 %rows, [rows];
    sub.u32 %rows, %rows, %i;
    ld.param.u32 %i, [each];
    min.u32 %rows, %rows, %i;
    ld.param.u32 %turn, [turn];
    mul.lo.u32 %i, %warp, {ROW};
    mad.lo.u32 %i, %lane, 4, %i;
    mul.wide.u32 %t, %i, {width};
    add.u64 %data, %data, %t;
    mov.u32 %n, %warp;
row:
    setp.ge.u32 %p, %n, %rows;
    @%p bra counted;
    {_load(width)}
    {line.join(tally)}
    add.u64 %data, %data, {WARPS * ROW * width};
    add.u32 %n, %n, {WARPS};
    bra row;
counted:
    bar.sync 0;
    ld.param.u64 %out, [counts];
    mul.wide.u32 %t, %thread, 4;
    add.u64 %out, %out, %t;
    {line.join(give)}
    ret;
}}
"""


def _take(width: int, k: int) -> str:
    """One symbol into this thread's coder; what the coders give up is put before what they gave up last."""
    return f"""
    {_element(width, k)}
    bfe.u32 %i, %e, %shift, 8;
    shl.b32 %i, %i, 2;
    add.u32 %i, %i, %shared;
    ld.shared.u32 %i, [%i];
    and.b32 %x0, %i, 0xffff;
    shr.u32 %x1, %i, 16;
    shr.u32 %x2, %state, {32 - BITS};
    setp.ge.u32 %p, %x2, %x0;
    vote.sync.ballot.b32 %x2, %p, -1;
    popc.b32 %x3, %x2;
    sub.u32 %at, %at, %x3;
    and.b32 %x2, %x2, %below;
    popc.b32 %x2, %x2;
    add.u32 %x2, %x2, %at;
    mul.wide.u32 %t, %x2, 2;
    add.u64 %t, %t, %out;
    cvt.u16.u32 %h, %state;
    @%p st.global.u16 [%t], %h;
    @%p shr.u32 %state, %state, 16;
    div.u32 %x2, %state, %x0;
    mul.lo.u32 %x3, %x2, %x0;
    sub.u32 %state, %state, %x3;
    shl.b32 %x2, %x2, {BITS};
    add.u32 %state, %state, %x2;
    add.u32 %state, %state, %x1;
"""


def _encode(width: int) -> str:
    return f"""
.visible .entry encode_{width}(
    .param .u64 data, .param .u32 turn, .param .u32 shift, .param .u64 table, .param .u32 rows,
    .param .u64 places, .param .u64 counts, .param .u64 states)
{{
    .shared .align 4 .b8 entries[1024];
    {_REGISTERS}
    mov.u32 %shared, entries;
    mov.u32 %below, %lanemask_lt;
    ld.param.u64 %u, [table];
    mul.wide.u32 %t, %thread, 4;
    add.u64 %t, %t, %u;
    ld.global.u32 %x0, [%t];
    shl.b32 %i, %thread, 2;
    add.u32 %i, %i, %shared;
    st.shared.u32 [%i], %x0;
    bar.sync 0;
    mov.u32 %i, %ctaid.x;
    mad.lo.u32 %warp, %i, {WARPS}, %warp;
    mul.lo.u32 %x0, %warp, {BLOCK // ROW};
    ld.param.u32 %rows, [rows];
    setp.ge.u32 %p, %x0, %rows;
    @%p bra done;
    sub.u32 %rows, %rows, %x0;
    min.u32 %rows, %rows, {BLOCK // ROW};
    ld.param.u32 %turn, [turn];
    ld.param.u32 %shift, [shift];
    ld.param.u64 %data, [data];
    mul.wide.u32 %t, %warp, {BLOCK * width};
    add.u64 %data, %data, %t;
    sub.u32 %i, %rows, 1;
    mul.lo.u32 %i, %i, {ROW};
    mad.lo.u32 %i, %lane, 4, %i;
    mul.wide.u32 %t, %i, {width};
    add.u64 %data, %data, %t;
    ld.param.u64 %out, [places];
    mul.wide.u32 %t, %warp, {2 * BLOCK};
    add.u64 %out, %out, %t;
    mov.u32 %at, {BLOCK};
    mov.u32 %state, {START};
row:
    {_load(width)}
    {"".join(_take(width, k) for k in (3, 2, 1, 0))}
    sub.u64 %data, %data, {ROW * width};
    sub.u32 %rows, %rows, 1;
    setp.ne.u32 %p, %rows, 0;
    @%p bra row;
    ld.param.u64 %u, [states];
    mad.lo.u32 %i, %warp, {LANES}, %lane;
    mul.wide.u32 %t, %i, 4;
    add.u64 %t, %t, %u;
    st.global.u32 [%t], %state;
    ld.param.u64 %u, [counts];
    mul.wide.u32 %t, %warp, 4;
    add.u64 %t, %t, %u;
    sub.u32 %at, {BLOCK}, %at;
    setp.eq.u32 %p, %lane, 0;
    @%p st.global.u32 [%t], %at;
done:
    ret;
}}
"""


def _plane(width: int) -> str:
    """Four bytes a thread, one of each element."""
    join = []
    for k in range(4):
        join += [_element(width, k), f"bfe.u32 %x{k}, %e, %shift, 8;"]
    return f"""
.visible .entry plane_{width}(
    .param .u64 data, .param .u32 turn, .param .u32 shift, .param .u32 rows, .param .u64 out)
{{
    {_REGISTERS}
    mov.u32 %i, %ctaid.x;
    mad.lo.u32 %i, %i, {WARPS}, %warp;
    ld.param.u32 %rows, [rows];
    setp.ge.u32 %p, %i, %rows;
    @%p bra done;
    mul.wide.u32 %u, %i, {ROW};
    mul.wide.u32 %t, %lane, 4;
    add.u64 %u, %u, %t;
    ld.param.u64 %out, [out];
    add.u64 %out, %out, %u;
    ld.param.u64 %data, [data];
    mul.lo.u64 %u, %u, {width};
    add.u64 %data, %data, %u;
    ld.param.u32 %turn, [turn];
    ld.param.u32 %shift, [shift];
    {_load(width)}
    {(chr(10) + "    ").join(join)}
    prmt.b32 %x0, %x0, %x1, 0x0040;
    prmt.b32 %x2, %x2, %x3, 0x0040;
    prmt.b32 %x0, %x0, %x2, 0x5410;
    st.global.u32 [%out], %x0;
done:
    ret;
}}
"""


def _pack() -> str:
    """The words of each block, one a block of threads, to where they end."""
    return f"""
.visible .entry pack(.param .u64 places, .param .u64 ends, .param .u64 out)
{{
    {_REGISTERS}
    mov.u32 %n, %ctaid.x;
    ld.param.u64 %u, [ends];
    mul.wide.u32 %t, %n, 4;
    add.u64 %u, %u, %t;
    ld.global.u32 %rows, [%u];
    mov.u32 %at, 0;
    setp.ne.u32 %p, %n, 0;
    @%p ld.global.u32 %at, [%u+-4];
    ld.param.u64 %out, [out];
    mul.wide.u32 %t, %at, 2;
    add.u64 %out, %out, %t;
    sub.u32 %rows, %rows, %at;
    ld.param.u64 %data, [places];
    mul.wide.u32 %t, %n, {2 * BLOCK};
    add.u64 %data, %data, %t;
    sub.u32 %at, {BLOCK}, %rows;
    mul.wide.u32 %t, %at, 2;
    add.u64 %data, %data, %t;
    mov.u32 %i, %thread;
word:
    setp.ge.u32 %p, %i, %rows;
    @%p bra done;
    mul.wide.u32 %t, %i, 2;
    add.u64 %u, %data, %t;
    ld.global.u16 %h, [%u];
    add.u64 %u, %out, %t;
    st.global.u16 [%u], %h;
    add.u32 %i, %i, {THREADS};
    bra word;
done:
    ret;
}}
"""


def _move() -> str:
    """Numbers of 32 bits, one a thread."""
    return f"""
.visible .entry move(.param .u64 from, .param .u64 to, .param .u32 count)
{{
    {_REGISTERS}
    mov.u32 %i, %ctaid.x;
    mad.lo.u32 %i, %i, {THREADS}, %thread;
    ld.param.u32 %n, [count];
    setp.ge.u32 %p, %i, %n;
    @%p bra done;
    mul.wide.u32 %t, %i, 4;
    ld.param.u64 %u, [from];
    add.u64 %u, %u, %t;
    ld.global.u32 %x0, [%u];
    ld.param.u64 %u, [to];
    add.u64 %u, %u, %t;
    st.global.u32 [%u], %x0;
done:
    ret;
}}
"""


ENTRIES = (*[f"{kind}_{width}" for width in WIDTHS for kind in ("count", "encode", "plane")], "pack", "move")
"""Kernels; THREADS threads a block."""


def source() -> bytes:
    """All of them."""
    entries = "".join(kind(width) for width in WIDTHS for kind in (_count, _encode, _plane))
    return f".version 7.0\n.target sm_70\n.address_size 64\n{entries}{_pack()}{_move()}".encode()
