"""What the kernels over GGUF blocks share: a program's rows, loads of activations, words of a thread, fp16 factors,
fetching ahead, the result."""

from __future__ import annotations

import triton
from triton import language as tl

BFLOAT16, FLOAT16, FLOAT32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator]
def split_pair(pair, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two 16-bit activations of one int32 as float32: (the first, the second)."""
    if KIND == BFLOAT16:
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def load_pair(x, index, mask, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Activations 2 `index` and 2 `index` + 1 as float32; `x` points to int32 words, or to float32 values."""
    if KIND == FLOAT32:
        first = tl.load(x + 2 * index, mask=mask, other=0.0)
        second = tl.load(x + 2 * index + 1, mask=mask, other=0.0)
    else:
        first, second = split_pair(tl.load(x + index, mask=mask, other=0), KIND)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def split_four(words, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """(A, B, 4) as four tensors (A, B): a thread that loaded four words at once has each in a register."""
    even, odd = tl.split(words.reshape(A, B, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def half_of(word):  # type: ignore[no-untyped-def]
    """The low 16 bits of an int as an fp16 scale, in float32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def fetch_ahead(  # type: ignore[no-untyped-def]
    first, tile, outputs, ROW: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr
):
    """Has the rows of a later program brought into the L2 cache; needs compute capability 9.0.

    A program that starts early waits for the kernel before it with its weights in registers, and the multiprocessors
    have no room for the rest of the grid: the memory would rest while they wait, and while they compute.

    Args:
        first: address of this program's first row.
        tile: number of that row.
        outputs: rows of the weight.
        ROW: bytes of a row.
        TILE: rows of a program.
        AHEAD: by how many programs it is later.
        WARPS: of a program.
    """
    rows = tl.minimum(outputs - tile - AHEAD * TILE, TILE)  # none if negative
    first += AHEAD * TILE * ROW
    address = first & -16
    left = (rows * ROW + (first - address).to(tl.int32)) & -16
    EACH: tl.constexpr = (TILE * ROW + 16 * WARPS - 1) // (16 * WARPS) * 16
    place = tl.arange(0, 32 * WARPS) // 32 * EACH  # alike in a warp, which asks once
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred some;
            setp.gt.s32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, $2;
        }
        """,
        "=r,l,r", [address + place, tl.minimum(left - place, EACH)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_activations(  # type: ignore[no-untyped-def]
    first, tile, outputs, ROW: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr
):
    """Of a program that starts early, once its weights are asked for: they do not depend on the kernel before this
    one, activations do. Arguments as of `fetch_ahead`; none is fetched ahead if `AHEAD` is 0."""
    if AHEAD:
        fetch_ahead(first, tile, outputs, ROW, TILE, AHEAD, WARPS)
    tl.extra.cuda.gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def row_starts(tile, outputs, ROW: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rows of a program begin, from its first one, (TILE,). An output too many reads the last row again: a
    mask would cost more than the loads it saves."""
    output = tl.arange(0, TILE)
    return (output if EVEN else tl.minimum(output, outputs - 1 - tile)) * ROW


@triton.jit  # type: ignore[untyped-decorator]
def at_eighth_byte(packed, tile, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's first row of 16-bit words: the last multiple of 8 bytes not after it, and the words left over."""
    before = tile.to(tl.int64) * ROW
    left_over = (before & 3).to(tl.int32)
    return packed + (before - left_over), left_over


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(out, result, some, tile, rows, outputs, TAKEN: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a program's (TAKEN, TILE) at row `some` and output `tile` of (rows, outputs)."""
    row = some + tl.arange(0, TAKEN)
    output = tl.arange(0, TILE)
    place = row[:, None].to(tl.int64) * outputs + (tile + output)[None, :]
    fits = tile + output < outputs
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & fits[None, :])
