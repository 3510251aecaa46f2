"""A few rows times a weight in blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Blocks are 18 to 34 bytes, so only 16-bit places are aligned. A thread takes two blocks ("chunk": 64 weights) of each
of its outputs. Layouts: ggml `ggml-common.h`.

Everything of a block but its fp16 factors is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import (
    dot_eight,
    fetch_ahead,
    fixed,
    load_four_words,
    spread,
    spread_unit,
    sum_of,
)
from hf_ctxopt.kernels.gguf_parts_triton import half_of

LIMIT = tl.constexpr(32767.0)  # 32 products of this and 128 stay below 2^31
LOW = tl.constexpr(0x0F0F0F0F)


@triton.jit  # type: ignore[untyped-decorator]
def _fifths(bits, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits `FIRST` … `FIRST` + 3 as bit 4 of four bytes."""
    return ((((bits >> FIRST) & 15) * 0x00204081) & 0x01010101) << 4


@triton.jit  # type: ignore[untyped-decorator]
def _codes(packed, wide, head, start, BITS: tl.constexpr, AFFINE: tl.constexpr, ALIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's 32 codes as bytes of eight words, in order, its factor and its minimum."""
    factor = half_of(tl.load(packed + head + start).to(tl.int32))
    minimum = half_of(tl.load(packed + head + start + 1).to(tl.int32)) if AFFINE else factor
    HEAD: tl.constexpr = 2 if AFFINE else 1
    if BITS == 8:
        c0, c1, c2, c3 = load_four_words(wide, head + HEAD, start, ALIGNED, ASM)
        c4, c5, c6, c7 = load_four_words(wide, head + (HEAD + 8), start, ALIGNED, ASM)
    else:
        w0, w1, w2, w3 = load_four_words(wide, head + (HEAD + (2 if BITS == 5 else 0)), start, ALIGNED, ASM)
        c0, c1, c2, c3 = w0 & LOW, w1 & LOW, w2 & LOW, w3 & LOW
        c4, c5, c6, c7 = (w0 >> 4) & LOW, (w1 >> 4) & LOW, (w2 >> 4) & LOW, (w3 >> 4) & LOW
        if BITS == 5:  # bit i of 32 is the fifth of weight i
            near = tl.load(packed + head + start + HEAD).to(tl.int32)
            far = tl.load(packed + head + start + (HEAD + 1)).to(tl.int32)
            c0, c1, c2, c3 = c0 | _fifths(near, 0), c1 | _fifths(near, 4), c2 | _fifths(near, 8), c3 | _fifths(near, 12)
            c4, c5, c6, c7 = c4 | _fifths(far, 0), c5 | _fifths(far, 4), c6 | _fifths(far, 8), c7 | _fifths(far, 12)
    return (c0, c1, c2, c3, c4, c5, c6, c7), factor, minimum


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, row, rows, first, COLUMNS: tl.constexpr, KIND: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's activations from chunk `first`: eight tuples of words, both blocks' sums, the unit."""
    index = first * 32 + tl.arange(0, CHUNKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    given = (index < COLUMNS // 2) & (index * 0 + row < rows)
    words, unit = fixed(x, row * (COLUMNS // 2) + index, given, KIND, LIMIT, ASM)
    xs = spread(words, CHUNKS)
    near, far = sum_of(xs[0], xs[1], ASM) + sum_of(xs[2], xs[3], ASM), sum_of(xs[4], xs[5], ASM) + sum_of(xs[6], xs[7], ASM)
    return (xs[0], xs[1], xs[2], xs[3]), (xs[4], xs[5], xs[6], xs[7]), near, far, spread_unit(unit, CHUNKS)


@triton.jit  # type: ignore[untyped-decorator]
def _product(weights, x, sum, BITS: tl.constexpr, AFFINE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block times 32 activations (four tuples of four words), (CHUNKS, TILE)."""
    codes, factor, minimum = weights
    SIGNED: tl.constexpr = BITS == 8
    total = tl.zeros(factor.shape, tl.int32)
    if BITS != 8 and not AFFINE:  # codes have a surplus: the sum starts at what that adds, negated
        total -= sum * (1 << (BITS - 1))
    total = dot_eight(total, x[0], codes[0], codes[1], SIGNED, ASM)
    total = dot_eight(total, x[1], codes[2], codes[3], SIGNED, ASM)
    total = dot_eight(total, x[2], codes[4], codes[5], SIGNED, ASM)
    total = dot_eight(total, x[3], codes[6], codes[7], SIGNED, ASM)
    product = factor * total.to(tl.float32)
    if AFFINE:
        product += minimum * sum.to(tl.float32)
    return product


@triton.jit  # type: ignore[untyped-decorator]
def matmul_flat(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,  # blocks with a minimum: Q4_1, Q5_1
    KIND: tl.constexpr,
    TAKEN: tl.constexpr,  # these as of `matmul_k`
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    WARPS: tl.constexpr,
):
    """out[m, o] = sum over columns of x[m] times weight[o].

    Args:
        x: (rows, COLUMNS) as int32 words, or float32.
        packed: (outputs, bytes of a row / 2) int16, at a multiple of 8 bytes.
        out: (rows, outputs).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = COLUMNS // 32
    WORDS: tl.constexpr = (2 if AFFINE else 1) + (2 if BITS == 5 else 0) + (16 if BITS == 8 else 8)
    ROW: tl.constexpr = BLOCKS * WORDS
    ALIGNED: tl.constexpr = ROW % 4 == 0
    STEPS: tl.constexpr = (BLOCKS + 2 * CHUNKS - 1) // (2 * CHUNKS)
    some = tl.program_id(0) * TAKEN
    tile = tl.program_id(1) * (TILE * PARTS)
    # The program's first weight, at a multiple of 8 bytes, and the 16-bit words left over.
    before = tile.to(tl.int64) * ROW
    left_over = (before & 3).to(tl.int32)
    packed += before - left_over
    wide = packed.to(tl.pointer_type(tl.int64))
    output = tl.arange(0, TILE)[None, :]
    part = tl.arange(0, PARTS)[:, None]
    result = tl.zeros((TAKEN * PARTS, TILE), tl.float32)
    for step in tl.range(STEPS):
        first = step * CHUNKS
        chunk = first + tl.arange(0, CHUNKS)
        near_head = (left_over + tl.minimum(2 * chunk, BLOCKS - 1) * WORDS)[:, None]
        far_head = (left_over + tl.minimum(2 * chunk + 1, BLOCKS - 1) * WORDS)[:, None]
        start = (output if EVEN else tl.minimum(output, outputs - 1 - tile)) * ROW
        near = _codes(packed, wide, near_head, start, BITS, AFFINE, ALIGNED, ASM)
        far = _codes(packed, wide, far_head, start, BITS, AFFINE, ALIGNED, ASM)
        if EARLY:
            if PARTS * STEPS > 1 and step == 0:
                HERE: tl.constexpr = TILE if STEPS == 1 else 0  # these rows are loaded already
                size = tl.minimum(outputs - tile - HERE, TILE * PARTS) * (ROW * 2)
                fetch_ahead(packed + (left_over + HERE * ROW), size, (TILE * PARTS - HERE) * ROW * 2, WARPS)
            tl.extra.cuda.gdc_wait()
        if PARTS == 1:
            for m in tl.range(TAKEN):
                given = _rounded(x, some + m, rows, first, COLUMNS, KIND, CHUNKS, ASM)
                done = _product(near, given[0], given[2], BITS, AFFINE, ASM)
                done += _product(far, given[1], given[3], BITS, AFFINE, ASM)
                done = tl.sum(done * given[4], 0)
                result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
        else:
            given = _rounded(x, some, rows, first, COLUMNS, KIND, CHUNKS, ASM)
            for index in tl.static_range(PARTS):
                done = _product(near, given[0], given[2], BITS, AFFINE, ASM)
                done += _product(far, given[1], given[3], BITS, AFFINE, ASM)
                if index + 1 < PARTS:
                    start = output + (index + 1) * TILE
                    start = (start if EVEN else tl.minimum(start, outputs - 1 - tile)) * ROW
                    near = _codes(packed, wide, near_head, start, BITS, AFFINE, ALIGNED, ASM)
                    far = _codes(packed, wide, far_head, start, BITS, AFFINE, ALIGNED, ASM)
                result += tl.where(part == index, tl.sum(done * given[4], 0)[None, :], 0.0)
    if PARTS == 1:
        row = some + tl.arange(0, TAKEN)[:, None]
        output = tile + output
    else:
        row = some + part * 0
        output = tile + part * TILE + output
    tl.store(
        out + row.to(tl.int64) * outputs + output, result.to(out.dtype.element_ty),
        mask=(row < rows) & (output < outputs),
    )  # fmt: skip
