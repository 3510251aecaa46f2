"""A few rows times a Q6_K weight: blocks of 256 weights in sixteen groups with a signed 8-bit scale.

A block is 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 scales and an fp16 factor: 210 bytes, so only
16-bit places are aligned. A thread takes 16 bytes of nibbles from either quarter of a half block and the 16 bytes of
pairs above them ("chunk": 64 weights of four groups) of each of its outputs. Layout: ggml `ggml-common.h`.

Everything of a chunk but its factor is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import dot_eight, fixed_row, load_four_words, spread, spread_unit, sum_of
from hf_ctxopt.kernels.gguf_parts_triton import at_eighth_byte, half_of, row_starts, store_rows, wait_for_activations

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
def _eight(sums, x0, x1, x2, x3, near, far, upper, more_near, more_far, more_upper, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the products of two words of codes of each of four groups."""
    a0, a1, a2, a3 = _codes(near, far, upper)
    b0, b1, b2, b3 = _codes(more_near, more_far, more_upper)
    d0, d1 = dot_eight(sums[0], x0, a0, b0, False, ASM), dot_eight(sums[1], x1, a1, b1, False, ASM)
    d2, d3 = dot_eight(sums[2], x2, a2, b2, False, ASM), dot_eight(sums[3], x3, a3, b3, False, ASM)
    return d0, d1, d2, d3


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
    BLOCKS: tl.constexpr = COLUMNS // 256
    ROW: tl.constexpr = BLOCKS * 105
    ALIGNED: tl.constexpr = ROW % 4 == 0
    ALL: tl.constexpr = BLOCKS * 4
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(1) * TAKEN
    tile = tl.program_id(0) * TILE
    packed, left_over = at_eighth_byte(packed, tile, ROW)
    wide = packed.to(tl.pointer_type(tl.int64))
    start = row_starts(tile, outputs, ROW, TILE, EVEN)[None, :]
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.range(STEPS):
        all_chunks = step * CHUNKS + tl.arange(0, CHUNKS)
        chunk = tl.minimum(all_chunks, ALL - 1) if ALL % CHUNKS else all_chunks
        half, side = chunk % 4 // 2, chunk % 2
        head = (left_over + chunk // 4 * 105)[:, None]
        codes = head + (half * 32 + side * 8)[:, None]
        n0, n1, n2, n3 = load_four_words(wide, codes, start, ALIGNED, ASM)
        f0, f1, f2, f3 = load_four_words(wide, codes + 16, start, ALIGNED, ASM)
        u0, u1, u2, u3 = load_four_words(wide, head + (64 + half * 16 + side * 8)[:, None], start, ALIGNED, ASM)
        scales = packed + (head + (96 + half * 4)[:, None]) + start
        shift = (24 - side * 8)[:, None]
        s0, s1 = _scale(scales, shift), _scale(scales + 1, shift)
        s2, s3 = _scale(scales + 2, shift), _scale(scales + 3, shift)
        factor = half_of(tl.load(packed + head + start + 104).to(tl.int32))
        if EARLY:
            wait_for_activations(packed.to(tl.int64) + 2 * left_over, tile, outputs, ROW * 2, TILE, AHEAD, WARPS)
        # A chunk's four groups lie 32 activations apart.
        k = tl.arange(0, 32)[None, :]
        base = (all_chunks // 2 * 64 + all_chunks % 2 * 8)[:, None]
        index = base + k // 8 * 16 + k % 8
        for m in tl.range(TAKEN):
            words, unit = fixed_row(x, index, some, m, rows, COLUMNS, TAKEN, KIND, LIMIT, ASM)
            x0, x1, x2, x3, x4, x5, x6, x7 = spread(words, CHUNKS)
            # Codes have a surplus of 32: the sums start at what that adds, negated.
            zeros = tl.zeros((CHUNKS, TILE), tl.int32)
            sums = (
                zeros - 32 * sum_of(x0, x1, ASM),
                zeros - 32 * sum_of(x2, x3, ASM),
                zeros - 32 * sum_of(x4, x5, ASM),
                zeros - 32 * sum_of(x6, x7, ASM),
            )
            sums = _eight(sums, x0, x2, x4, x6, n0, f0, u0, n1, f1, u1, ASM)
            d0, d1, d2, d3 = _eight(sums, x1, x3, x5, x7, n2, f2, u2, n3, f3, u3, ASM)
            product = (d0 * s0 + d1 * s1).to(tl.float32) + (d2 * s2 + d3 * s3).to(tl.float32)
            done = tl.sum(factor * product * spread_unit(unit, CHUNKS), 0)
            result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
    store_rows(out, result, some, tile, rows, outputs, TAKEN, TILE)
