"""Activations as 16-bit fixed point, and integer dot products with codes of weights held in bytes.

A thread that holds 64 activations scales the largest of them to `LIMIT` (of the kernel) and rounds: the error is at
most 1 / 65,534 of that largest one, a hundredth of what bfloat16 itself loses. A product of two activations and two
codes is then one instruction (`dp2a`, compute capability 6.1), for which the codes need not become floats: Hopper's
integer units, half as many as its float units, were what bound these kernels. Where there is no such instruction the
same integers are formed by shifts and products.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import FLOAT32, split_four, split_pair

SMALLEST = tl.constexpr(1e-30)  # below it an activation counts as 0: 32,767 / 1e-34 would overflow
# 1.5 * 2^23: added to a float below 2^22 it leaves the float's nearest integer in the low bits.
ROUND = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def load_four_pairs(x, index, given, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Activations 8 `index` … 8 `index` + 7 of a thread, (CHUNKS, 1, 4): int32 pairs, or a tuple of two floats."""
    place = index[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    if KIND == FLOAT32:
        first = tl.load(x + 2 * place, mask=given[:, :, None], other=0.0)
        second = tl.load(x + 2 * place + 1, mask=given[:, :, None], other=0.0)
    else:
        first, second = split_pair(tl.load(x + place, mask=given[:, :, None], other=0), KIND)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def larger(first, second):  # type: ignore[no-untyped-def]
    """Larger of two sizes; NaN if either is."""
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def size_of(pair):  # type: ignore[no-untyped-def]
    """Larger absolute value of either float of a pair."""
    return larger(tl.abs(pair[0]), tl.abs(pair[1]))


@triton.jit  # type: ignore[untyped-decorator]
def unit_of(size, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(what turns an activation into fixed point, what turns it back), given the largest; NaN stays NaN."""
    return tl.where(size > SMALLEST, LIMIT / size, 0.0), size * (1 / LIMIT)


@triton.jit  # type: ignore[untyped-decorator]
def fixed(pair, scale, CHUNKS: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words with two activations in fixed point each, the first in the low half."""
    first = (pair[0] * scale[:, :, None] + ROUND).to(tl.int32, bitcast=True)
    second = (pair[1] * scale[:, :, None] + ROUND).to(tl.int32, bitcast=True)
    if ASM:
        words = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        words = (first & 0xFFFF) | (second << 16)
    return split_four(words, CHUNKS, 1)


@triton.jit  # type: ignore[untyped-decorator]
def dot_two(total, fixed_pair, codes, HIGH: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + the pair's two activations times two unsigned bytes of `codes`: the low two, or the high two."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "dp2a.hi.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [fixed_pair, codes, total], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [fixed_pair, codes, total], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    bits = codes >> 16 if HIGH else codes
    return total + ((fixed_pair << 16) >> 16) * (bits & 255) + (fixed_pair >> 16) * ((bits >> 8) & 255)


@triton.jit  # type: ignore[untyped-decorator]
def sum_of(total, pairs, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + all eight activations of four words."""
    ones = tl.full(total.shape, 0x0101, tl.int32)
    total = dot_two(total, pairs[0], ones, False, ASM)
    total = dot_two(total, pairs[1], ones, False, ASM)
    total = dot_two(total, pairs[2], ones, False, ASM)
    return dot_two(total, pairs[3], ones, False, ASM)


@triton.jit  # type: ignore[untyped-decorator]
def dot_eight(total, pairs, first, second, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + eight activations (four words) times the eight bytes of two words."""
    total = dot_two(total, pairs[0], first, False, ASM)
    total = dot_two(total, pairs[1], first, True, ASM)
    total = dot_two(total, pairs[2], second, False, ASM)
    return dot_two(total, pairs[3], second, True, ASM)


@triton.jit  # type: ignore[untyped-decorator]
def largest_of(p0, p1, p2, p3, p4, p5, p6, p7, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest absolute value of 64 activations, (CHUNKS, 1)."""
    near = larger(larger(size_of(p0), size_of(p1)), larger(size_of(p2), size_of(p3)))
    far = larger(larger(size_of(p4), size_of(p5)), larger(size_of(p6), size_of(p7)))
    s0, s1, s2, s3 = split_four(larger(near, far), CHUNKS, 1)
    return larger(larger(s0, s1), larger(s2, s3))


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
def load_four_words(packed, half, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words that start at any 16-bit place: three aligned 64-bit loads, shifted.

    Args:
        packed: pointer to int64.
        half: 16-bit words before the first one.
    """
    place = half >> 2
    a, b, c = tl.load(packed + place), tl.load(packed + place + 1), tl.load(packed + place + 2)
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
