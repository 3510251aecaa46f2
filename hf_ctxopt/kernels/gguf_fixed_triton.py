"""Activations as 16-bit fixed point, and integer dot products with codes of weights held in bytes.

Of every 64 activations ("chunk") the largest is scaled to `LIMIT` of the kernel and all are rounded: the error is at
most 1 / 65,534 (Q6_K: 32,766) of that largest one, a hundredth of what bfloat16 itself loses. A product of two
activations and two codes is then one instruction (`dp2a`, compute capability 6.1), for which the codes need not become
floats: Hopper's integer units, half as many as its float units, were what bound these kernels. Where there is no such
instruction the same integers are formed by shifts and products.

The threads of a program share the rounding, each of a few coalesced words, and exchange the results; a thread that
read the 128 bytes of its own chunk would take 32 cache lines with each load of a warp.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import load_pair, split_four

SMALLEST = tl.constexpr(1e-30)  # an activation below it counts as 0: the inverse of its unit would be too large
# 1.5 * 2^23: added to a float below 2^22 it leaves the float's nearest integer in the low bits.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _larger(first, second):  # type: ignore[no-untyped-def]
    """Larger of two sizes; NaN if either is."""
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def halves(low, high, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A word of the lower halves of two."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return (low & 0xFFFF) | (high << 16)


@triton.jit  # type: ignore[untyped-decorator]
def fixed(x, index, given, KIND: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Chunks of activations in fixed point.

    Args:
        x: as of `load_pair`.
        index: (CHUNKS, 32) pairs of activations; runs of four follow each other.
        given: (CHUNKS, 32), false for pairs that count as zero.

    Returns:
        (CHUNKS, 32) words with two activations each, the first in the low half; (CHUNKS, 1) what one unit is worth.
    """
    first, second = load_pair(x, index, given, KIND)
    size = tl.reduce(_larger(tl.abs(first), tl.abs(second)), 1, _larger, keep_dims=True)
    unit = size * (1 / LIMIT)
    if ASM:
        scale = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [unit], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        scale = 1.0 / tl.maximum(unit, SMALLEST / LIMIT)
    scale = tl.where(size > SMALLEST, scale, 0.0)  # NaN and infinity come back by the unit
    first = (first * scale + ROUND).to(tl.int32, bitcast=True)
    second = (second * scale + ROUND).to(tl.int32, bitcast=True)
    return halves(first, second, ASM), unit


@triton.jit  # type: ignore[untyped-decorator]
def fixed_row(  # type: ignore[no-untyped-def]
    x, index, some, m, rows, COLUMNS: tl.constexpr, TAKEN: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`fixed` of row `some` + `m` of (rows, COLUMNS): pairs past its end, and rows past the last, count as zero."""
    given = index < COLUMNS // 2
    if TAKEN > 1:
        given &= index * 0 + some + m < rows
    return fixed(x, (some + m) * (COLUMNS // 2) + index, given, KIND, LIMIT, ASM)


@triton.jit  # type: ignore[untyped-decorator]
def spread(words, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(CHUNKS, 32) as eight tuples of four (CHUNKS, 1), in order: a thread has all words of its chunk."""
    parts = words.reshape(CHUNKS, 2, 2, 2, 4).permute(0, 4, 1, 2, 3)
    even, odd = tl.split(parts)
    e, f = tl.split(even)
    g, h = tl.split(odd)
    p0, p4 = tl.split(e)
    p2, p6 = tl.split(f)
    p1, p5 = tl.split(g)
    p3, p7 = tl.split(h)
    return (
        split_four(p0, CHUNKS, 1),
        split_four(p1, CHUNKS, 1),
        split_four(p2, CHUNKS, 1),
        split_four(p3, CHUNKS, 1),
        split_four(p4, CHUNKS, 1),
        split_four(p5, CHUNKS, 1),
        split_four(p6, CHUNKS, 1),
        split_four(p7, CHUNKS, 1),
    )


@triton.jit  # type: ignore[untyped-decorator]
def spread_unit(unit, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(CHUNKS, 1) for the threads of `spread`'s results: it takes their way; else the products would."""
    return spread(unit.broadcast_to(CHUNKS, 32), CHUNKS)[0][0]


@triton.jit  # type: ignore[untyped-decorator]
def dot_two(total, pair, codes, HIGH: tl.constexpr, SIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + a word's two activations times two bytes of `codes`: the low two, or the high two."""
    if ASM:
        KIND: tl.constexpr = "s32" if SIGNED else "u32"
        HALF: tl.constexpr = "hi" if HIGH else "lo"
        return tl.inline_asm_elementwise(
            "dp2a." + HALF + ".s32." + KIND + " $0, $1, $2, $3;", "=r,r,r,r", [pair, codes, total], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    bits = codes >> 16 if HIGH else codes
    if SIGNED:
        return total + ((pair << 16) >> 16) * ((bits << 24) >> 24) + (pair >> 16) * ((bits << 16) >> 24)
    return total + ((pair << 16) >> 16) * (bits & 255) + (pair >> 16) * ((bits >> 8) & 255)


@triton.jit  # type: ignore[untyped-decorator]
def dot_eight(total, words, first, second, SIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + eight activations (four words) times the eight bytes of two words of codes."""
    total = dot_two(total, words[0], first, False, SIGNED, ASM)
    total = dot_two(total, words[1], first, True, SIGNED, ASM)
    total = dot_two(total, words[2], second, False, SIGNED, ASM)
    return dot_two(total, words[3], second, True, SIGNED, ASM)


@triton.jit  # type: ignore[untyped-decorator]
def sum_of(first, second, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of sixteen activations (two times four words)."""
    ones = tl.full(first[0].shape, 0x01010101, tl.int32)
    total = dot_eight(tl.zeros(first[0].shape, tl.int32), first, ones, ones, False, ASM)
    return dot_eight(total, second, ones, ones, False, ASM)


@triton.jit  # type: ignore[untyped-decorator]
def _next_half(word, following, shifted, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`word`, or where `shifted` its upper and the following word's lower half."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, following, tl.where(shifted, 0x5432, 0x3210)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.where(shifted, ((word >> 16) & 0xFFFF) | (following << 16), word)


@triton.jit  # type: ignore[untyped-decorator]
def load_four_words(packed, place, start, ALIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words that start at any 16-bit place: three aligned 64-bit loads, shifted.

    Args:
        packed: pointer to int64.
        place, start: (CHUNKS, 1) and (1, TILE); their sum is the number of 16-bit words before the first one.
        ALIGNED: whether `start` is a multiple of 4: then a thread shifts by the same amount for all its outputs.
    """
    if ALIGNED:
        half = place
        at = packed + (place >> 2) + (start >> 2)
    else:
        half = place + start
        at = packed + (half >> 2)
    # No 64-bit word is read that has none of the bytes wanted: it could lie behind the end of the memory.
    a, b, c = tl.load(at), tl.load(at + 1), tl.load(at + tl.where((half & 3) != 0, 2, 1))
    skip, shifted = (half & 2) != 0, (half & 1) != 0
    a0, a1 = a.to(tl.int32), (a >> 32).to(tl.int32)
    b0, b1 = b.to(tl.int32), (b >> 32).to(tl.int32)
    c0, c1 = c.to(tl.int32), (c >> 32).to(tl.int32)
    v0, v1, v2 = tl.where(skip, a1, a0), tl.where(skip, b0, a1), tl.where(skip, b1, b0)
    v3, v4 = tl.where(skip, c0, b1), tl.where(skip, c1, c0)
    return (
        _next_half(v0, v1, shifted, ASM),
        _next_half(v1, v2, shifted, ASM),
        _next_half(v2, v3, shifted, ASM),
        _next_half(v3, v4, shifted, ASM),
    )
