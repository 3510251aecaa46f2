"""Activations as 16-bit fixed point, and integer dot products with codes of weights held in bytes.

A thread that holds 64 activations (32 for Q6_K) scales the largest of them to `LIMIT` and rounds: the error is at
most 1 / 65,534 of that largest one, a hundredth of what bfloat16 itself loses. A product of two activations and two
codes is then one instruction (`dp2a`, compute capability 6.1), for which the codes need not become floats: Hopper's
integer units, half as many as its float units, were what bound these kernels. Where there is no such instruction the
same integers are formed by shifts and products.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import FLOAT32, split_four, split_pair

LIMIT = tl.constexpr(32767.0)  # largest fixed-point activation
SMALLEST = tl.constexpr(1e-30)  # below it an activation counts as 0: LIMIT / 1e-34 would overflow
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
def unit_of(size):  # type: ignore[no-untyped-def]
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
