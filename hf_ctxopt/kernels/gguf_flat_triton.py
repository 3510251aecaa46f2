"""A few rows times a weight in blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Blocks are 18 to 34 bytes, so only 16-bit places are aligned. A thread takes two blocks ("chunk": 64 weights) of each
of its outputs. Layouts: ggml `ggml-common.h`.

Everything of a block but its fp16 factors is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import dot_eight, fixed_row, load_four_words, spread, spread_unit, sum_of
from hf_ctxopt.kernels.gguf_parts_triton import at_eighth_byte, half_of, row_starts, store_rows, wait_for_activations

LIMIT = tl.constexpr(32767.0)  # 32 products of this and 128 stay below 2^31
LOW = tl.constexpr(0x0F0F0F0F)


@triton.jit  # type: ignore[untyped-decorator]
def _fifths(bits, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits `FIRST` … `FIRST` + 3 as bit 4 of four bytes."""
    return ((((bits >> FIRST) & 15) * 0x00204081) & 0x01010101) << 4


@triton.jit  # type: ignore[untyped-decorator]
def _codes(  # type: ignore[no-untyped-def]
    packed, wide, head, start, BITS: tl.constexpr, AFFINE: tl.constexpr, ALIGNED: tl.constexpr, ASM: tl.constexpr
):
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
            c0, c1, c2 = c0 | _fifths(near, 0), c1 | _fifths(near, 4), c2 | _fifths(near, 8)
            c3, c4, c5 = c3 | _fifths(near, 12), c4 | _fifths(far, 0), c5 | _fifths(far, 4)
            c6, c7 = c6 | _fifths(far, 8), c7 | _fifths(far, 12)
    return (c0, c1, c2, c3, c4, c5, c6, c7), factor, minimum


@triton.jit  # type: ignore[untyped-decorator]
def _product(codes, factor, minimum, x0, x1, x2, x3, BITS: tl.constexpr, AFFINE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block times 32 activations (four tuples of four words), (CHUNKS, TILE)."""
    SIGNED: tl.constexpr = BITS == 8
    total = tl.zeros(factor.shape, tl.int32)
    if BITS != 8:
        sum = sum_of(x0, x1, ASM) + sum_of(x2, x3, ASM)
        if not AFFINE:  # codes have a surplus: the sum starts at what that adds, negated
            total -= sum * (1 << (BITS - 1))
    total = dot_eight(total, x0, codes[0], codes[1], SIGNED, ASM)
    total = dot_eight(total, x1, codes[2], codes[3], SIGNED, ASM)
    total = dot_eight(total, x2, codes[4], codes[5], SIGNED, ASM)
    total = dot_eight(total, x3, codes[6], codes[7], SIGNED, ASM)
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
    TAKEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,  # whether outputs are a multiple of TILE
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
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
    some = tl.program_id(1) * TAKEN
    tile = tl.program_id(0) * TILE
    packed, left_over = at_eighth_byte(packed, tile, ROW)
    wide = packed.to(tl.pointer_type(tl.int64))
    start = row_starts(tile, outputs, ROW, TILE, EVEN)[None, :]
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        head = (left_over + tl.minimum(2 * chunk, BLOCKS - 1) * WORDS)[:, None]
        near, near_factor, near_minimum = _codes(packed, wide, head, start, BITS, AFFINE, ALIGNED, ASM)
        head = (left_over + tl.minimum(2 * chunk + 1, BLOCKS - 1) * WORDS)[:, None]
        far, far_factor, far_minimum = _codes(packed, wide, head, start, BITS, AFFINE, ALIGNED, ASM)
        if EARLY:
            wait_for_activations(packed.to(tl.int64) + 2 * left_over, tile, outputs, ROW * 2, TILE, AHEAD, WARPS)
        index = chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
        for m in tl.range(TAKEN):
            words, unit = fixed_row(x, index, some, m, rows, COLUMNS, TAKEN, KIND, LIMIT, ASM)
            x0, x1, x2, x3, x4, x5, x6, x7 = spread(words, CHUNKS)
            done = _product(near, near_factor, near_minimum, x0, x1, x2, x3, BITS, AFFINE, ASM)
            done += _product(far, far_factor, far_minimum, x4, x5, x6, x7, BITS, AFFINE, ASM)
            done = tl.sum(done * spread_unit(unit, CHUNKS), 0)
            result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
    store_rows(out, result, some, tile, rows, outputs, TAKEN, TILE)
