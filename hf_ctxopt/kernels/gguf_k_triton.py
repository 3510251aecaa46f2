"""A few rows times a Q4_K or Q5_K weight: blocks of 256 weights in eight groups with a scale and a minimum.

A block is a 16-byte header (fp16 scale, fp16 scale of the minima, eight pairs of 6-bit integers), for Q5_K 32 bytes
of fifth bits, and 128 bytes of nibbles: 16-byte aligned. A thread takes two times 16 bytes of nibbles ("chunk": the 64
weights of groups 2 k and 2 k + 1) of each of its outputs. Layout: ggml `ggml-common.h`.

Everything of a chunk but its two fp16 factors is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import dot_eight, fixed, largest_of, load_four_pairs, sum_of, unit_of
from hf_ctxopt.kernels.gguf_parts_triton import half_of, split_four

LIMIT = tl.constexpr(32767.0)  # two groups of Q4_K's 32 products of 15, this and 63 stay below 2^31


@triton.jit  # type: ignore[untyped-decorator]
def _nibbles(word, fifth, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of a word of nibbles as bytes: (those of the first group, those of the second).

    `fifth` has the first group's fifth bits in bits 4, 12, 20 and 28, the second's one above.
    """
    low, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
    if BITS == 5:
        low, high = low | (fifth & 0x10101010), high | ((fifth >> 1) & 0x10101010)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def _fifths(packed, first, inner, left, right, CHUNKS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words of fifth bits, those of the chunk's first group in bits 4, 12, 20 and 28."""
    f0, f1, f2, f3 = split_four(tl.load(packed + first[:, :, None] + inner), CHUNKS, TILE)
    return (f0 << left) >> right, (f1 << left) >> right, (f2 << left) >> right, (f3 << left) >> right


@triton.jit  # type: ignore[untyped-decorator]
def _eight(low, high, x, at, w0, w1, f0, f1, BITS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds two words' products with `x`' fixed-point words of either group."""
    l0, h0 = _nibbles(w0, f0, BITS)
    l1, h1 = _nibbles(w1, f1, BITS)
    return dot_eight(low, x, l0, l1, ASM), dot_eight(high, at, h0, h1, ASM)


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
    ASM: tl.constexpr,  # whether NVIDIA's instructions can be used
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
    output = tl.arange(0, TILE)
    packed += tile.to(tl.int64) * (BLOCKS * WORDS)
    # An output or a chunk too many reads the last one again: a mask would cost more than the loads it saves.
    start = tl.minimum(output, outputs - 1 - tile) * (BLOCKS * WORDS)
    inner = tl.arange(0, 4)[None, None, :]
    row_of = tl.zeros((CHUNKS, 1), tl.int32) + some
    total = tl.zeros((CHUNKS, TILE), tl.float32)
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        chunk = tl.minimum(chunk, ALL - 1)
        block, pair = chunk // 4, (chunk % 4)[:, None]
        head = start[None, :] + (block * WORDS)[:, None]
        codes = head + (WORDS - 32) + pair * 8
        w0, w1, w2, w3 = split_four(tl.load(packed + codes[:, :, None] + inner), CHUNKS, TILE)
        w4, w5, w6, w7 = split_four(tl.load(packed + codes[:, :, None] + inner + 4), CHUNKS, TILE)
        factors, first, second, third = split_four(tl.load(packed + head[:, :, None] + inner), CHUNKS, TILE)
        if BITS == 5:
            left, right = tl.maximum(4 - 2 * pair, 0), tl.maximum(2 * pair - 4, 0)
            f0, f1, f2, f3 = _fifths(packed, head + 4, inner, left, right, CHUNKS, TILE)
            f4, f5, f6, f7 = _fifths(packed, head + 8, inner, left, right, CHUNKS, TILE)
        else:
            f0, f1, f2, f3, f4, f5, f6, f7 = w0, w0, w0, w0, w0, w0, w0, w0
        # Both 6-bit scales of the chunk, in bits 0-5 and 8-13, and both minima: groups 4-7 have their upper two bits
        # where groups 0-3 have nothing else.
        late = pair >= 2
        half = (pair & 1) * 16
        upper, mask, lower = half + tl.where(late, 2, 0), tl.where(late, 0x3030, 0x3F3F), tl.where(late, 0x0F0F, 0)
        scales = ((first >> upper) & mask) | ((third >> half) & lower)
        minima = ((second >> upper) & mask) | ((third >> (half + 4)) & lower)
        if EARLY:
            tl.extra.cuda.gdc_wait()  # weights do not depend on the kernel before this one, activations do
        for m in tl.static_range(TAKEN):
            given = valid[:, None] & (row_of + m < rows)
            at = ((some + m) * (COLUMNS // 8) + block * 32 + (chunk % 4) * 8)[:, None]
            p0, p1 = load_four_pairs(x, at, given, KIND), load_four_pairs(x, at + 1, given, KIND)
            p2, p3 = load_four_pairs(x, at + 2, given, KIND), load_four_pairs(x, at + 3, given, KIND)
            p4, p5 = load_four_pairs(x, at + 4, given, KIND), load_four_pairs(x, at + 5, given, KIND)
            p6, p7 = load_four_pairs(x, at + 6, given, KIND), load_four_pairs(x, at + 7, given, KIND)
            scale, back = unit_of(largest_of(p0, p1, p2, p3, p4, p5, p6, p7, CHUNKS), LIMIT)
            x0, x1 = fixed(p0, scale, CHUNKS, ASM), fixed(p1, scale, CHUNKS, ASM)
            x2, x3 = fixed(p2, scale, CHUNKS, ASM), fixed(p3, scale, CHUNKS, ASM)
            x4, x5 = fixed(p4, scale, CHUNKS, ASM), fixed(p5, scale, CHUNKS, ASM)
            x6, x7 = fixed(p6, scale, CHUNKS, ASM), fixed(p7, scale, CHUNKS, ASM)
            none = tl.zeros((CHUNKS, 1), tl.int32)
            low_sum = sum_of(sum_of(sum_of(sum_of(none, x0, ASM), x1, ASM), x2, ASM), x3, ASM)
            high_sum = sum_of(sum_of(sum_of(sum_of(none, x4, ASM), x5, ASM), x6, ASM), x7, ASM)
            low = tl.zeros((CHUNKS, TILE), tl.int32)
            high = tl.zeros((CHUNKS, TILE), tl.int32)
            low, high = _eight(low, high, x0, x4, w0, w1, f0, f1, BITS, ASM)
            low, high = _eight(low, high, x1, x5, w2, w3, f2, f3, BITS, ASM)
            low, high = _eight(low, high, x2, x6, w4, w5, f4, f5, BITS, ASM)
            low, high = _eight(low, high, x3, x7, w6, w7, f6, f7, BITS, ASM)
            low, high = low * (scales & 255), high * (scales >> 8)
            if BITS == 4:
                product = (low + high).to(tl.float32)
            else:  # two groups' 32 products of 31, 32,767 and 63 exceed 2^31
                product = low.to(tl.float32) + high.to(tl.float32)
            less = low_sum * (minima & 255) + high_sum * (minima >> 8)
            done = half_of(factors) * product - half_of(factors >> 16) * less.to(tl.float32)
            if TAKEN == 1:
                total += done * back
            else:
                this = tl.arange(0, TAKEN)[:, None] == m
                result += tl.where(this, tl.sum(done * back, 0)[None, :], 0.0)
    if TAKEN == 1:
        result += tl.sum(total, 0)[None, :]
    row = some + tl.arange(0, TAKEN)
    place_out = row[:, None].to(tl.int64) * outputs + (tile + output)[None, :]
    fits = tile + output < outputs
    tl.store(out + place_out, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & fits[None, :])
