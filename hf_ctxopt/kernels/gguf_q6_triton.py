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
    fetch_ahead,
    fixed,
    load_four_words,
    spread,
    spread_unit,
    sum_of,
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
def _eight(sums, x0, x1, x2, x3, near, far, upper, more_near, more_far, more_upper, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the products of two words of codes of each of four groups."""
    a0, a1, a2, a3 = _codes(near, far, upper)
    b0, b1, b2, b3 = _codes(more_near, more_far, more_upper)
    d0, d1 = dot_eight(sums[0], x0, a0, b0, False, ASM), dot_eight(sums[1], x1, a1, b1, False, ASM)
    d2, d3 = dot_eight(sums[2], x2, a2, b2, False, ASM), dot_eight(sums[3], x3, a3, b3, False, ASM)
    return d0, d1, d2, d3


@triton.jit  # type: ignore[untyped-decorator]
def _load(packed, wide, head, chunk, start, ALIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Chunks of outputs: four words each of both quarters' nibbles and of bit pairs, four scales, the factor."""
    half, side = chunk % 4 // 2, chunk % 2
    codes = head + (half * 32 + side * 8)[:, None]
    near = load_four_words(wide, codes, start, ALIGNED, ASM)
    far = load_four_words(wide, codes + 16, start, ALIGNED, ASM)
    upper = load_four_words(wide, head + (64 + half * 16 + side * 8)[:, None], start, ALIGNED, ASM)
    words = packed + (head + (96 + half * 4)[:, None]) + start
    shift = (24 - side * 8)[:, None]
    scales = _scale(words, shift), _scale(words + 1, shift), _scale(words + 2, shift), _scale(words + 3, shift)
    return near, far, upper, scales, half_of(tl.load(packed + head + start + 104).to(tl.int32))


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, row, rows, first, COLUMNS: tl.constexpr, KIND: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's activations from chunk `first`: eight tuples of words, the four groups' sums, the unit."""
    chunk = first + tl.arange(0, CHUNKS)[:, None]
    k = tl.arange(0, 32)[None, :]
    index = chunk // 2 * 64 + chunk % 2 * 8 + k // 8 * 16 + k % 8  # a chunk's four groups lie 32 activations apart
    given = (index < COLUMNS // 2) & (index * 0 + row < rows)
    words, unit = fixed(x, row * (COLUMNS // 2) + index, given, KIND, LIMIT, ASM)
    xs = spread(words, CHUNKS)
    sums = sum_of(xs[0], xs[1], ASM), sum_of(xs[2], xs[3], ASM), sum_of(xs[4], xs[5], ASM), sum_of(xs[6], xs[7], ASM)
    return xs, sums, spread_unit(unit, CHUNKS)


@triton.jit  # type: ignore[untyped-decorator]
def _product(weights, given, CHUNKS: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of chunks of `_load` and `_rounded`, (CHUNKS, TILE)."""
    n, f, u, s, factor = weights
    xs, sums, unit = given
    # Codes have a surplus of 32: the sums start at what that adds, negated.
    zeros = tl.zeros((CHUNKS, TILE), tl.int32)
    d = zeros - 32 * sums[0], zeros - 32 * sums[1], zeros - 32 * sums[2], zeros - 32 * sums[3]
    d = _eight(d, xs[0], xs[2], xs[4], xs[6], n[0], f[0], u[0], n[1], f[1], u[1], ASM)
    d = _eight(d, xs[1], xs[3], xs[5], xs[7], n[2], f[2], u[2], n[3], f[3], u[3], ASM)
    product = (d[0] * s[0] + d[1] * s[1]).to(tl.float32) + (d[2] * s[2] + d[3] * s[3]).to(tl.float32)
    return factor * product * unit


@triton.jit  # type: ignore[untyped-decorator]
def matmul_q6(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    COLUMNS: tl.constexpr,
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
    BLOCKS: tl.constexpr = COLUMNS // 256
    ROW: tl.constexpr = BLOCKS * 105
    ALIGNED: tl.constexpr = ROW % 4 == 0
    ALL: tl.constexpr = BLOCKS * 4
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
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
        if ALL % CHUNKS:
            chunk = tl.minimum(chunk, ALL - 1)
        head = (left_over + chunk // 4 * 105)[:, None]
        start = (output if EVEN else tl.minimum(output, outputs - 1 - tile)) * ROW
        weights = _load(packed, wide, head, chunk, start, ALIGNED, ASM)
        if EARLY:
            if PARTS * STEPS > 1 and step == 0:
                HERE: tl.constexpr = TILE if STEPS == 1 else 0  # these rows are loaded already
                size = tl.minimum(outputs - tile - HERE, TILE * PARTS) * (ROW * 2)
                fetch_ahead(packed + (left_over + HERE * ROW), size, (TILE * PARTS - HERE) * ROW * 2, WARPS)
            tl.extra.cuda.gdc_wait()
        if PARTS == 1:
            for m in tl.range(TAKEN):
                given = _rounded(x, some + m, rows, first, COLUMNS, KIND, CHUNKS, ASM)
                done = tl.sum(_product(weights, given, CHUNKS, TILE, ASM), 0)
                result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
        else:
            given = _rounded(x, some, rows, first, COLUMNS, KIND, CHUNKS, ASM)
            for index in tl.static_range(PARTS):
                product = _product(weights, given, CHUNKS, TILE, ASM)
                if index + 1 < PARTS:
                    start = output + (index + 1) * TILE
                    start = (start if EVEN else tl.minimum(start, outputs - 1 - tile)) * ROW
                    weights = _load(packed, wide, head, chunk, start, ALIGNED, ASM)
                result += tl.where(part == index, tl.sum(product, 0)[None, :], 0.0)
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
