"""A few rows times a Q4_K or Q5_K weight: blocks of 256 weights in eight groups with a scale and a minimum.

A block is a 16-byte header (fp16 scale, fp16 scale of the minima, eight pairs of 6-bit integers), for Q5_K 32 bytes
of fifth bits, and 128 bytes of nibbles: 16-byte aligned, so a thread takes 16 bytes of nibbles ("chunk": 16 weights
of group 2 k and 16 of group 2 k + 1) in one load. Layout: ggml `ggml-common.h`.

A code becomes a float without a conversion: put into the mantissa of 1.0 it reads 1 + code / 2^n. The surplus ones are
taken off once per chunk, with the sum of the activations that the minima need anyway.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import half_of, load_four

ONE = tl.constexpr(0x3F800000)
LOW, HIGH = tl.constexpr(0xF0000), tl.constexpr(0xF000)  # where low and high nibbles are put: bits 16 and 12
LOW_UNIT, HIGH_UNIT = tl.constexpr(128.0), tl.constexpr(2048.0)  # 2^23 / 2^16, 2^23 / 2^12


@triton.jit  # type: ignore[untyped-decorator]
def _low(word, byte: tl.constexpr, fifth, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 + code / 128 of the low nibble of a byte; `fifth` holds its fifth bit in bit 8 byte."""
    if byte == 0:
        code = word << 16
    elif byte == 1:
        code = word << 8
    elif byte == 2:
        code = word
    else:
        code = word >> 8
    code = code & LOW
    if BITS == 5:
        code = code | (((fifth >> (8 * byte)) & 1) << 20)
    return (code | ONE).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _high(word, byte: tl.constexpr, fifth, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 + code / 2048 of the high nibble of a byte."""
    if byte == 0:
        code = word << 8
    elif byte == 1:
        code = word
    elif byte == 2:
        code = word >> 8
    else:
        code = word >> 16
    code = code & HIGH
    if BITS == 5:
        code = code | (((fifth >> (8 * byte)) & 1) << 16)
    return (code | ONE).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _group(first, second, third, group):  # type: ignore[no-untyped-def]
    """6-bit scale and minimum of `group` (0–7) from the header's three words, as float32."""
    shift = (group & 3) * 8
    a, b, c = first >> shift, second >> shift, third >> shift
    late = group >= 4
    scale = tl.where(late, (c & 15) | ((a >> 2) & 48), a & 63)
    minimum = tl.where(late, ((c >> 4) & 15) | ((b >> 2) & 48), b & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


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
):
    """out[m, o] = sum over columns of x[m] times weight[o].

    Args:
        x: (rows, COLUMNS) as int64 words, or float32.
        packed: (outputs, words of a row) int32.
        out: (rows, outputs).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    WORDS: tl.constexpr = 36 if BITS == 4 else 44
    BLOCKS: tl.constexpr = COLUMNS // 256
    ALL: tl.constexpr = BLOCKS * 8
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(0) * TAKEN + tl.arange(0, TAKEN)
    output = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = output.to(tl.int64) * (BLOCKS * WORDS)
    fits = output < outputs
    live = some < rows
    inner = tl.arange(0, 4)
    total = tl.zeros((TAKEN, TILE, CHUNKS), tl.float32)
    for step in tl.static_range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        block, place = chunk // 8, chunk % 8
        pair, side = place // 2, place % 2
        head = start[:, None] + (block * WORDS)[None, :]
        here = fits[:, None] & valid[None, :]
        codes = start[:, None, None] + (block * WORDS + WORDS - 32 + place * 4)[None, :, None] + inner[None, None, :]
        word = tl.load(packed + codes, mask=here[:, :, None], other=0)
        factors = tl.load(packed + head, mask=here, other=0)
        first = tl.load(packed + head + 1, mask=here, other=0)
        second = tl.load(packed + head + 2, mask=here, other=0)
        third = tl.load(packed + head + 3, mask=here, other=0)
        if BITS == 5:
            bits = start[:, None, None] + (block * WORDS + 4 + side * 4)[None, :, None] + inner[None, None, :]
            fifth = tl.load(packed + bits, mask=here[:, :, None], other=0) >> (2 * pair)[None, :, None]
        else:
            fifth = word
        if EARLY and step == 0:
            tl.extra.cuda.gdc_wait()  # weights do not depend on the kernel before this one, activations do
        at = some[:, None, None] * (COLUMNS // 4) + (block * 64 + pair * 16 + side * 4)[None, :, None]
        at = at + inner[None, None, :]
        given = live[:, None, None] & valid[None, :, None]
        a0, a1, a2, a3 = load_four(x, at, given, KIND)
        b0, b1, b2, b3 = load_four(x, at + 8, given, KIND)
        low = a0[:, None] * _low(word, 0, fifth, BITS)[None] + a1[:, None] * _low(word, 1, fifth, BITS)[None]
        low += a2[:, None] * _low(word, 2, fifth, BITS)[None]
        low += a3[:, None] * _low(word, 3, fifth, BITS)[None]
        above = fifth >> 1
        high = b0[:, None] * _high(word, 0, above, BITS)[None] + b1[:, None] * _high(word, 1, above, BITS)[None]
        high += b2[:, None] * _high(word, 2, above, BITS)[None]
        high += b3[:, None] * _high(word, 3, above, BITS)[None]
        low_sum = tl.sum(a0 + a1 + a2 + a3, 2)[:, None]
        high_sum = tl.sum(b0 + b1 + b2 + b3, 2)[:, None]
        scale, base = half_of(factors), half_of(factors >> 16)
        low_scale, low_minimum = _group(first, second, third, (2 * pair)[None, :])
        high_scale, high_minimum = _group(first, second, third, (2 * pair + 1)[None, :])
        total += (scale * low_scale * LOW_UNIT)[None] * (tl.sum(low, 3) - low_sum)
        total += (scale * high_scale * HIGH_UNIT)[None] * (tl.sum(high, 3) - high_sum)
        total -= (base * low_minimum)[None] * low_sum + (base * high_minimum)[None] * high_sum
    place_out = some[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(out + place_out, tl.sum(total, 2).to(out.dtype.element_ty), mask=live[:, None] & fits[None, :])
