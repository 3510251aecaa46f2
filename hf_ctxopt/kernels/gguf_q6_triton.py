"""A few rows times a Q6_K weight: blocks of 256 weights in sixteen groups with a signed 8-bit scale.

A block is 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 scales and an fp16 factor: 210 bytes, so only
16-bit places are aligned. A thread takes 16 bytes of nibbles from either quarter of a half block and the 16 bytes of
pairs above them ("chunk": 64 weights of four groups) of each of its outputs. Layout: ggml `ggml-common.h`.

Everything of a chunk but its factor is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import (
    dot_eight,
    fixed,
    largest_of,
    load_four_pairs,
    load_four_words,
    sum_of,
    unit_of,
)
from hf_ctxopt.kernels.gguf_parts_triton import half_of

LIMIT = tl.constexpr(16383.0)  # two groups' 16 products of 32, this and 128 stay below 2^31


@triton.jit
def _codes(near, far, upper):  # type: ignore[no-untyped-def]
    """Codes (0-63) of four groups as bytes."""
    n, f = near & 0x0F0F0F0F, far & 0x0F0F0F0F
    above, beyond = (near >> 4) & 0x0F0F0F0F, (far >> 4) & 0x0F0F0F0F
    return (
        n | ((upper << 4) & 0x30303030),
        f | ((upper << 2) & 0x30303030),
        above | (upper & 0x30303030),
        beyond | ((upper >> 2) & 0x30303030),
    )


@triton.jit
def _scale(words, shift):  # type: ignore[no-untyped-def]
    """A signed 8-bit scale out of a 16-bit word: the low byte for a shift of 24, the high one for 16."""
    return (tl.load(words).to(tl.int32) << shift) >> 24


@triton.jit  # type: ignore[untyped-decorator]
def _eight(d0, d1, d2, d3, x0, x1, x2, x3, near, far, upper, more_near, more_far, more_upper, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the products of two words of codes of each group."""
    a0, a1, a2, a3 = _codes(near, far, upper)
    b0, b1, b2, b3 = _codes(more_near, more_far, more_upper)
    return (
        dot_eight(d0, x0, a0, b0, ASM),
        dot_eight(d1, x1, a1, b1, ASM),
        dot_eight(d2, x2, a2, b2, ASM),
        dot_eight(d3, x3, a3, b3, ASM),
    )


@triton.jit  # type: ignore[untyped-decorator]
def matmul_q6(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    TAKEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[m, o] = sum over columns of x[m] times weight[o].

    Args:
        x: (rows, COLUMNS) as int32 words, or float32.
        packed: (outputs, bytes of a row / 2) int16, at a multiple of 8 bytes.
        out: (rows, outputs).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = COLUMNS // 256
    ALL: tl.constexpr = BLOCKS * 4
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(1) * TAKEN
    tile = tl.program_id(0) * TILE
    output = tl.arange(0, TILE)
    # The program's first weight, at a multiple of 8 bytes, and the 16-bit words left over.
    first = tile.to(tl.int64) * (BLOCKS * 105)
    left_over = (first & 3).to(tl.int32)
    packed += first - left_over
    wide = packed.to(tl.pointer_type(tl.int64))
    start = left_over + tl.minimum(output, outputs - 1 - tile) * (BLOCKS * 105)
    row_of = tl.zeros((CHUNKS, 1), tl.int32) + some
    total = tl.zeros((CHUNKS, TILE), tl.float32)
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        chunk = tl.minimum(chunk, ALL - 1)
        block, half, side = chunk // 4, (chunk % 4) // 2, chunk % 2
        head = start[None, :] + (block * 105)[:, None]
        codes = head + (half * 32 + side * 8)[:, None]
        n0, n1, n2, n3 = load_four_words(wide, codes, ASM)
        f0, f1, f2, f3 = load_four_words(wide, codes + 16, ASM)
        u0, u1, u2, u3 = load_four_words(wide, head + (64 + half * 16 + side * 8)[:, None], ASM)
        scales = packed + head + (96 + half * 4)[:, None]
        shift = (24 - side * 8)[:, None]
        s0, s1 = _scale(scales, shift), _scale(scales + 1, shift)
        s2, s3 = _scale(scales + 2, shift), _scale(scales + 3, shift)
        factor = half_of(tl.load(packed + head + 104).to(tl.int32))
        if EARLY:
            tl.extra.cuda.gdc_wait()
        for m in tl.static_range(TAKEN):
            given = valid[:, None] & (row_of + m < rows)
            at = ((some + m) * (COLUMNS // 8) + block * 32 + half * 16 + side * 2)[:, None]
            p0, p1 = load_four_pairs(x, at, given, KIND), load_four_pairs(x, at + 1, given, KIND)
            p2, p3 = load_four_pairs(x, at + 4, given, KIND), load_four_pairs(x, at + 5, given, KIND)
            p4, p5 = load_four_pairs(x, at + 8, given, KIND), load_four_pairs(x, at + 9, given, KIND)
            p6, p7 = load_four_pairs(x, at + 12, given, KIND), load_four_pairs(x, at + 13, given, KIND)
            scale, back = unit_of(largest_of(p0, p1, p2, p3, p4, p5, p6, p7, CHUNKS), LIMIT)
            x0, x1 = fixed(p0, scale, CHUNKS, ASM), fixed(p1, scale, CHUNKS, ASM)
            x2, x3 = fixed(p2, scale, CHUNKS, ASM), fixed(p3, scale, CHUNKS, ASM)
            x4, x5 = fixed(p4, scale, CHUNKS, ASM), fixed(p5, scale, CHUNKS, ASM)
            x6, x7 = fixed(p6, scale, CHUNKS, ASM), fixed(p7, scale, CHUNKS, ASM)
            # Codes have a surplus of 32: the sums start at what that adds, negated.
            none = tl.zeros((CHUNKS, 1), tl.int32)
            zeros = tl.zeros((CHUNKS, TILE), tl.int32)
            d0 = zeros - 32 * sum_of(sum_of(none, x0, ASM), x1, ASM)
            d1 = zeros - 32 * sum_of(sum_of(none, x2, ASM), x3, ASM)
            d2 = zeros - 32 * sum_of(sum_of(none, x4, ASM), x5, ASM)
            d3 = zeros - 32 * sum_of(sum_of(none, x6, ASM), x7, ASM)
            d0, d1, d2, d3 = _eight(d0, d1, d2, d3, x0, x2, x4, x6, n0, f0, u0, n1, f1, u1, ASM)
            d0, d1, d2, d3 = _eight(d0, d1, d2, d3, x1, x3, x5, x7, n2, f2, u2, n3, f3, u3, ASM)
            product = (d0 * s0 + d1 * s1).to(tl.float32) + (d2 * s2 + d3 * s3).to(tl.float32)
            done = factor * product * back
            if TAKEN == 1:
                total += done
            else:
                this = tl.arange(0, TAKEN)[:, None] == m
                result += tl.where(this, tl.sum(done, 0)[None, :], 0.0)
    if TAKEN == 1:
        result += tl.sum(total, 0)[None, :]
    row = some + tl.arange(0, TAKEN)
    place_out = row[:, None].to(tl.int64) * outputs + (tile + output)[None, :]
    fits = tile + output < outputs
    tl.store(out + place_out, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & fits[None, :])
