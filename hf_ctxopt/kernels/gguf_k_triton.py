"""A few rows times a Q4_K or Q5_K weight: blocks of 256 weights in eight groups with a scale and a minimum.

A block is a 16-byte header (fp16 scale, fp16 scale of the minima, eight pairs of 6-bit integers), for Q5_K 32 bytes
of fifth bits, and 128 bytes of nibbles: 16-byte aligned. A thread takes two times 16 bytes of nibbles ("chunk": the 64
weights of groups 2 k and 2 k + 1) of each of its outputs. Layout: ggml `ggml-common.h`.

Everything of a chunk but its two fp16 factors is summed in integers, see `gguf_fixed_triton`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_fixed_triton import dot_eight, fetch_ahead, fixed, spread, spread_unit, sum_of
from hf_ctxopt.kernels.gguf_parts_triton import half_of, split_four

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
def _load(packed, chunk, start, BITS: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes, fifth bits, factors, scales and minima of chunks of outputs.

    Returns:
        Eight words of nibbles; eight of fifth bits; the word of both factors; both 6-bit scales in bits 0-5 and 8-13;
        both minima alike.
    """
    inner = tl.arange(0, 4)[None, None, :]
    pair = (chunk % 4)[:, None]
    # Pointers are summed in this order so that those of the outputs differ by constants.
    head = packed + (chunk // 4 * WORDS)[:, None]
    codes = head + pair * 8 + start[None, :] + (WORDS - 32)
    head = head + start[None, :]
    words = split_four(tl.load(codes[:, :, None] + inner), CHUNKS, TILE)
    more = split_four(tl.load(codes[:, :, None] + inner + 4), CHUNKS, TILE)
    if BITS == 5:
        left, right = tl.maximum(4 - 2 * pair, 0), tl.maximum(2 * pair - 4, 0)
        fifths = _fifths(head + 4, inner, left, right, CHUNKS, TILE)
        more_fifths = _fifths(head + 8, inner, left, right, CHUNKS, TILE)
    else:
        fifths, more_fifths = words, more
    factors, a, b, c = split_four(tl.load(head[:, :, None] + inner), CHUNKS, TILE)
    # Groups 4-7 have their upper two bits where groups 0-3 have nothing else.
    late = pair >= 2
    half = (pair & 1) * 16
    upper, mask, lower = half + tl.where(late, 2, 0), tl.where(late, 0x3030, 0x3F3F), tl.where(late, 0x0F0F, 0)
    scales = ((a >> upper) & mask) | ((c >> half) & lower)
    minima = ((b >> upper) & mask) | ((c >> (half + 4)) & lower)
    return words, more, fifths, more_fifths, factors, scales, minima


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, row, rows, first, COLUMNS: tl.constexpr, KIND: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's activations from chunk `first`: words of both groups, the groups' sums, the unit."""
    index = first * 32 + tl.arange(0, CHUNKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    given = (index < COLUMNS // 2) & (index * 0 + row < rows)
    words, unit = fixed(x, row * (COLUMNS // 2) + index, given, KIND, LIMIT, ASM)
    x0, x1, x2, x3, x4, x5, x6, x7 = spread(words, CHUNKS)
    low_sum = sum_of(x0, x1, ASM) + sum_of(x2, x3, ASM)
    high_sum = sum_of(x4, x5, ASM) + sum_of(x6, x7, ASM)
    return (x0, x1, x2, x3), (x4, x5, x6, x7), low_sum, high_sum, spread_unit(unit, CHUNKS)


@triton.jit  # type: ignore[untyped-decorator]
def _product(weights, given, BITS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of chunks of `_load` and `_rounded`, (CHUNKS, TILE)."""
    words, more, fifths, more_fifths, factors, scales, minima = weights
    near, far, low_sum, high_sum, unit = given
    low = tl.zeros((CHUNKS, TILE), tl.int32)
    high = tl.zeros((CHUNKS, TILE), tl.int32)
    low, high = _eight(low, high, near[0], far[0], words[0], words[1], fifths[0], fifths[1], BITS, ASM)
    low, high = _eight(low, high, near[1], far[1], words[2], words[3], fifths[2], fifths[3], BITS, ASM)
    low, high = _eight(low, high, near[2], far[2], more[0], more[1], more_fifths[0], more_fifths[1], BITS, ASM)
    low, high = _eight(low, high, near[3], far[3], more[2], more[3], more_fifths[2], more_fifths[3], BITS, ASM)
    if BITS == 4:
        product = (low * (scales & 255) + (high >> 4) * (scales >> 8)).to(tl.float32)
    else:  # two groups' 32 products of 31, 32,767 and 63 exceed 2^31
        product = (low * (scales & 255)).to(tl.float32) + (high * (scales >> 8)).to(tl.float32)
    less = low_sum * (minima & 255) + high_sum * (minima >> 8)
    return (half_of(factors) * product - half_of(factors >> 16) * less.to(tl.float32)) * unit


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
    TILE: tl.constexpr,  # outputs that a program holds at a time
    PARTS: tl.constexpr,  # times TILE outputs of a program; 1 if TAKEN is not
    CHUNKS: tl.constexpr,  # chunks of one step
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,  # whether outputs are a multiple of TILE
    ASM: tl.constexpr,  # whether NVIDIA's instructions can be used
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
    some = tl.program_id(0) * TAKEN
    tile = tl.program_id(1) * (TILE * PARTS)
    packed += tile.to(tl.int64) * (BLOCKS * WORDS)
    output = tl.arange(0, TILE)
    part = tl.arange(0, PARTS)[:, None]
    result = tl.zeros((TAKEN * PARTS, TILE), tl.float32)
    for step in tl.range(STEPS):
        first = step * CHUNKS
        # An output or a chunk too many reads the last one again: a mask would cost more than the loads it saves.
        chunk = first + tl.arange(0, CHUNKS)
        if ALL % CHUNKS:
            chunk = tl.minimum(chunk, ALL - 1)
        start = (output if EVEN else tl.minimum(output, outputs - 1 - tile)) * (BLOCKS * WORDS)
        weights = _load(packed, chunk, start, BITS, WORDS, CHUNKS, TILE)
        if EARLY:
            if PARTS * STEPS > 1 and step == 0:
                HERE: tl.constexpr = TILE if STEPS == 1 else 0  # these rows are loaded already
                size = tl.minimum(outputs - tile - HERE, TILE * PARTS) * (BLOCKS * WORDS * 4)  # no overflow of 2^31
                SIZE: tl.constexpr = (TILE * PARTS - HERE) * BLOCKS * WORDS * 4
                fetch_ahead(packed + HERE * BLOCKS * WORDS, size, SIZE, WARPS)
            tl.extra.cuda.gdc_wait()  # weights do not depend on the kernel before this one, activations do
        if PARTS == 1:
            for m in tl.range(TAKEN):
                given = _rounded(x, some + m, rows, first, COLUMNS, KIND, CHUNKS, ASM)
                done = tl.sum(_product(weights, given, BITS, CHUNKS, TILE, ASM), 0)
                result += tl.where(tl.arange(0, TAKEN)[:, None] == m, done[None, :], 0.0)
        else:
            given = _rounded(x, some, rows, first, COLUMNS, KIND, CHUNKS, ASM)
            for index in tl.static_range(PARTS):
                product = _product(weights, given, BITS, CHUNKS, TILE, ASM)
                if index + 1 < PARTS:
                    start = output + (index + 1) * TILE
                    start = (start if EVEN else tl.minimum(start, outputs - 1 - tile)) * (BLOCKS * WORDS)
                    weights = _load(packed, chunk, start, BITS, WORDS, CHUNKS, TILE)
                result += tl.where(part == index, tl.sum(product, 0)[None, :], 0.0)
    if PARTS == 1:
        row = some + tl.arange(0, TAKEN)[:, None]
        output = tile + output[None, :]
    else:
        row = some + part * 0
        output = tile + part * TILE + output[None, :]
    tl.store(
        out + row.to(tl.int64) * outputs + output, result.to(out.dtype.element_ty),
        mask=(row < rows) & (output < outputs),
    )  # fmt: skip
