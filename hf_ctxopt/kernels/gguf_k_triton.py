"""A few rows times a Q4_K or Q5_K weight: blocks of 256 weights in eight groups with a scale and a minimum.

A block is a 16-byte header (fp16 scale, fp16 scale of the minima, eight pairs of 6-bit integers), for Q5_K 32 bytes
of fifth bits, and 128 bytes of nibbles: 16-byte aligned. A thread takes two times 16 bytes of nibbles ("chunk": the 64
weights of groups 2 k and 2 k + 1) of each of its outputs. Layout: ggml `ggml-common.h`.

Everything of a chunk but its two fp16 factors is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import dot_eight, fixed_row, halves, spread, spread_unit, sum_of
from hf_ctxopt.kernels.gguf_parts_triton import half_of, row_starts, split_four, store_rows, wait_for_activations

LIMIT = tl.constexpr(32767.0)  # two groups of Q4_K's 32 products of 15, this and 63 stay below 2^31
LOW, HIGH = tl.constexpr(0x0F0F0F0F), tl.constexpr(-0x0F0F0F10)  # low and high nibbles
LOW_FIFTH = tl.constexpr(0x10101010)


@triton.jit  # type: ignore[untyped-decorator]
def _fifths(first, inner, left, right, CHUNKS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words of fifth bits, those of the chunk's first group in bits 4, 12, 20 and 28."""
    f0, f1, f2, f3 = split_four(tl.load(first[:, :, None] + inner), CHUNKS, TILE)
    return (f0 << left) >> right, (f1 << left) >> right, (f2 << left) >> right, (f3 << left) >> right


@triton.jit  # type: ignore[untyped-decorator]
def _eight(low, high, x, at, w0, w1, f0, f1, BITS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds two words' products with the activations of either group; the second group's are 16 times too large in
    Q4_K, where a shift of the sum takes the place of one of every word."""
    if BITS == 4:
        low = dot_eight(low, x, w0 & LOW, w1 & LOW, False, ASM)
        high = dot_eight(high, at, w0 & HIGH, w1 & HIGH, False, ASM)
    else:
        low = dot_eight(low, x, (w0 & LOW) | (f0 & LOW_FIFTH), (w1 & LOW) | (f1 & LOW_FIFTH), False, ASM)
        w0, w1 = ((w0 >> 4) & LOW) | ((f0 >> 1) & LOW_FIFTH), ((w1 >> 4) & LOW) | ((f1 >> 1) & LOW_FIFTH)
        high = dot_eight(high, at, w0, w1, False, ASM)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def matmul_k(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    TAKEN: tl.constexpr,  # rows of x of a program
    TILE: tl.constexpr,  # outputs of a program
    CHUNKS: tl.constexpr,  # chunks of one step
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,  # whether outputs are a multiple of TILE
    ASM: tl.constexpr,  # whether NVIDIA's instructions can be used
    AHEAD: tl.constexpr,  # the program so many later has its weights fetched into the L2 cache; 0 for none
    WARPS: tl.constexpr,
):
    """out[m, o] = sum over columns of x[m] times weight[o].

    Args:
        x: (rows, COLUMNS) as int32 words, or float32.
        packed: (outputs, words of a row) int32.
        out: (rows, outputs).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    WORDS: tl.constexpr = 36 if BITS == 4 else 44
    BLOCKS: tl.constexpr = COLUMNS // 256
    ALL: tl.constexpr = BLOCKS * 4
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(1) * TAKEN
    tile = tl.program_id(0) * TILE
    packed += tile.to(tl.int64) * (BLOCKS * WORDS)
    start = row_starts(tile, outputs, BLOCKS * WORDS, TILE, EVEN)
    inner = tl.arange(0, 4)[None, None, :]
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.range(STEPS):
        first = step * CHUNKS
        chunk = first + tl.arange(0, CHUNKS)
        if ALL % CHUNKS:  # a chunk too many reads the last one again, as `row_starts`
            chunk = tl.minimum(chunk, ALL - 1)
        pair = (chunk % 4)[:, None]
        # Pointers are summed in this order so that those of the outputs differ by constants.
        head = packed + (chunk // 4 * WORDS)[:, None]
        codes = head + pair * 8 + start[None, :] + (WORDS - 32)
        head = head + start[None, :]
        w0, w1, w2, w3 = split_four(tl.load(codes[:, :, None] + inner), CHUNKS, TILE)
        w4, w5, w6, w7 = split_four(tl.load(codes[:, :, None] + inner + 4), CHUNKS, TILE)
        if BITS == 5:
            left, right = tl.maximum(4 - 2 * pair, 0), tl.maximum(2 * pair - 4, 0)
            f0, f1, f2, f3 = _fifths(head + 4, inner, left, right, CHUNKS, TILE)
            f4, f5, f6, f7 = _fifths(head + 8, inner, left, right, CHUNKS, TILE)
        else:
            f0, f1, f2, f3, f4, f5, f6, f7 = w0, w0, w0, w0, w0, w0, w0, w0
        factors, a, b, c = split_four(tl.load(head[:, :, None] + inner), CHUNKS, TILE)
        # Both 6-bit scales of the chunk, in bits 0-5 and 8-13, and both minima, in bits 16-21 and 24-29: a register
        # less for every output. Groups 4-7 have their upper two bits where groups 0-3 have nothing else.
        late = pair >= 2
        half = (pair & 1) * 16
        upper, mask, lower = half + tl.where(late, 2, 0), tl.where(late, 0x3030, 0x3F3F), tl.where(late, 0x0F0F, 0)
        scales = ((a >> upper) & mask) | ((c >> half) & lower)
        minima = ((b >> upper) & mask) | ((c >> (half + 4)) & lower)
        six = halves(scales, minima, ASM)
        if EARLY:
            wait_for_activations(packed.to(tl.int64), tile, outputs, BLOCKS * WORDS * 4, TILE, AHEAD, WARPS)
        for m in tl.range(TAKEN):
            index = first * 32 + tl.arange(0, CHUNKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
            words, unit = fixed_row(x, index, some, m, rows, COLUMNS, TAKEN, KIND, LIMIT, ASM)
            x0, x1, x2, x3, x4, x5, x6, x7 = spread(words, CHUNKS)
            low_sum = sum_of(x0, x1, ASM) + sum_of(x2, x3, ASM)
            high_sum = sum_of(x4, x5, ASM) + sum_of(x6, x7, ASM)
            low = tl.zeros((CHUNKS, TILE), tl.int32)
            high = tl.zeros((CHUNKS, TILE), tl.int32)
            low, high = _eight(low, high, x0, x4, w0, w1, f0, f1, BITS, ASM)
            low, high = _eight(low, high, x1, x5, w2, w3, f2, f3, BITS, ASM)
            low, high = _eight(low, high, x2, x6, w4, w5, f4, f5, BITS, ASM)
            low, high = _eight(low, high, x3, x7, w6, w7, f6, f7, BITS, ASM)
            if BITS == 4:
                product = (low * (six & 255) + (high >> 4) * ((six >> 8) & 255)).to(tl.float32)
            else:  # two groups' 32 products of 31, 32,767 and 63 exceed 2^31
                product = (low * (six & 255)).to(tl.float32) + (high * ((six >> 8) & 255)).to(tl.float32)
            less = low_sum * ((six >> 16) & 255) + high_sum * (six >> 24)
            done = half_of(factors) * product - half_of(factors >> 16) * less.to(tl.float32)
            done = tl.sum(done * spread_unit(unit, CHUNKS), 0)
            result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
    store_rows(out, result, some, tile, rows, outputs, TAKEN, TILE)
