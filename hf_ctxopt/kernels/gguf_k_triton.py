"""A few rows times a Q4_K or Q5_K weight: blocks of 256 weights in eight groups with a scale and a minimum.

A block is a 16-byte header (fp16 scale, fp16 scale of the minima, eight pairs of 6-bit integers), for Q5_K 32 bytes
of fifth bits, and 128 bytes of nibbles: 16-byte aligned. A thread takes two times 16 bytes of nibbles ("chunk": the 64
weights of groups 2 k and 2 k + 1). Layout: ggml `ggml-common.h`.

A code becomes a float without a conversion: put into the mantissa of 1.0 it reads 1 + code / 2^n. The surplus ones are
taken off once per chunk, with the sum of the activations that the minima need anyway.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import FLOAT32, floats_of, half_of, split_four

LOW, HIGH = tl.constexpr(0xF0000), tl.constexpr(0xF000)  # where low and high nibbles are put: bits 16 and 12
LOW_UNIT, HIGH_UNIT = tl.constexpr(128.0), tl.constexpr(2048.0)  # 2^23 / 2^16, 2^23 / 2^12


@triton.jit  # type: ignore[untyped-decorator]
def _low(word, byte: tl.constexpr, fifth, one, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
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
    return (code | one).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _high(word, byte: tl.constexpr, fifth, one, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
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
    return (code | one).to(tl.float32, bitcast=True)


@triton.jit
def _group(first, second, third, group):  # type: ignore[no-untyped-def]
    """6-bit scale and minimum of `group` (0–7) from the header's three words, as float32."""
    shift = (group & 3) * 8
    a, b, c = first >> shift, second >> shift, third >> shift
    late = group >= 4
    scale = tl.where(late, (c & 15) | ((a >> 2) & 48), a & 63)
    minimum = tl.where(late, ((c >> 4) & 15) | ((b >> 2) & 48), b & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _word(low, high, word, fifth, x, lows, highs, at, given, one, BITS: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds one word's eight products to `low` and `high`; also the sums of its activations."""
    a, b, c, d = floats_of(x, lows, at, given, KIND)
    low += a * _low(word, 0, fifth, one, BITS)
    low += b * _low(word, 1, fifth, one, BITS)
    low += c * _low(word, 2, fifth, one, BITS)
    low += d * _low(word, 3, fifth, one, BITS)
    low_sum = (a + b) + (c + d)
    a, b, c, d = floats_of(x, highs, at + 8, given, KIND)
    above = fifth >> 1
    high += a * _high(word, 0, above, one, BITS)
    high += b * _high(word, 1, above, one, BITS)
    high += c * _high(word, 2, above, one, BITS)
    high += d * _high(word, 3, above, one, BITS)
    return low, high, low_sum, (a + b) + (c + d)


@triton.jit  # type: ignore[untyped-decorator]
def _half(  # type: ignore[no-untyped-def]
    low, high, words, fifths, x, at, given, one, inner, CHUNKS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr
):
    """Adds the products of four words."""
    w0, w1, w2, w3 = words
    f0, f1, f2, f3 = fifths
    if KIND == FLOAT32:
        l0, l1, l2, l3 = words
        h0, h1, h2, h3 = words
    else:
        many = at[:, :, None] + inner[None, None, :]
        l0, l1, l2, l3 = split_four(tl.load(x + many, mask=given[:, :, None], other=0), 1, CHUNKS)
        h0, h1, h2, h3 = split_four(tl.load(x + many + 8, mask=given[:, :, None], other=0), 1, CHUNKS)
    low, high, s0, t0 = _word(low, high, w0, f0, x, l0, h0, at, given, one, BITS, KIND)
    low, high, s1, t1 = _word(low, high, w1, f1, x, l1, h1, at + 1, given, one, BITS, KIND)
    low, high, s2, t2 = _word(low, high, w2, f2, x, l2, h2, at + 2, given, one, BITS, KIND)
    low, high, s3, t3 = _word(low, high, w3, f3, x, l3, h3, at + 3, given, one, BITS, KIND)
    return low, high, (s0 + s1) + (s2 + s3), (t0 + t1) + (t2 + t3)


@triton.jit  # type: ignore[untyped-decorator]
def _fifths(packed, first, here, shift, TILE: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four words of fifth bits, those of the chunk's first group in bits 0, 8, 16 and 24."""
    f0, f1, f2, f3 = split_four(tl.load(packed + first, mask=here[:, :, None], other=0), TILE, CHUNKS)
    return f0 >> shift, f1 >> shift, f2 >> shift, f3 >> shift


@triton.jit  # type: ignore[untyped-decorator]
def matmul_k(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    one,  # the bits of 1.0: from a register, they are set by the instruction that masks the code
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
    ALL: tl.constexpr = BLOCKS * 4
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(0) * TAKEN
    tile = tl.program_id(1) * TILE
    output = tl.arange(0, TILE)
    packed += tile.to(tl.int64) * (BLOCKS * WORDS)
    start = output * (BLOCKS * WORDS)
    fits = tile + output < outputs
    inner = tl.arange(0, 4)
    row_of = tl.zeros((1, CHUNKS), tl.int32) + some
    total = tl.zeros((TILE, CHUNKS), tl.float32)
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.static_range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        block, pair = chunk // 4, chunk % 4
        head = start[:, None] + (block * WORDS)[None, :]
        here = fits[:, None] & valid[None, :]
        codes = start[:, None, None] + (block * WORDS + WORDS - 32 + pair * 8)[None, :, None] + inner[None, None, :]
        near = tl.load(packed + codes, mask=here[:, :, None], other=0)
        far = tl.load(packed + codes + 4, mask=here[:, :, None], other=0)
        factors = tl.load(packed + head, mask=here, other=0)
        first = tl.load(packed + head + 1, mask=here, other=0)
        second = tl.load(packed + head + 2, mask=here, other=0)
        third = tl.load(packed + head + 3, mask=here, other=0)
        near_words = split_four(near, TILE, CHUNKS)
        far_words = split_four(far, TILE, CHUNKS)
        if BITS == 5:
            bits = start[:, None, None] + (block * WORDS + 4)[None, :, None] + inner[None, None, :]
            near_fifths = _fifths(packed, bits, here, (2 * pair)[None, :], TILE, CHUNKS)
            far_fifths = _fifths(packed, bits + 4, here, (2 * pair)[None, :], TILE, CHUNKS)
        else:
            near_fifths, far_fifths = near_words, far_words
        if EARLY and step == 0:
            tl.extra.cuda.gdc_wait()  # weights do not depend on the kernel before this one, activations do
        scale, base = half_of(factors), half_of(factors >> 16)
        low_scale, low_minimum = _group(first, second, third, (2 * pair)[None, :])
        high_scale, high_minimum = _group(first, second, third, (2 * pair + 1)[None, :])
        low_scale, high_scale = scale * low_scale * LOW_UNIT, scale * high_scale * HIGH_UNIT
        # What one unit of the activations' sum is worth: the surplus ones, and the minimum.
        low_less, high_less = low_scale + base * low_minimum, high_scale + base * high_minimum
        for m in tl.static_range(TAKEN):
            given = valid[None, :] & (row_of + m < rows)
            at = ((some + m) * (COLUMNS // 4) + block * 64 + pair * 16)[None, :]
            low = tl.zeros((TILE, CHUNKS), tl.float32)
            high = tl.zeros((TILE, CHUNKS), tl.float32)
            low, high, low_sum, high_sum = _half(
                low, high, near_words, near_fifths, x, at, given, one, inner, CHUNKS, BITS, KIND
            )
            low, high, more_low, more_high = _half(
                low, high, far_words, far_fifths, x, at + 4, given, one, inner, CHUNKS, BITS, KIND
            )
            low_sum, high_sum = low_sum + more_low, high_sum + more_high
            here_sum = low_scale * low + high_scale * high - (low_less * low_sum + high_less * high_sum)
            if TAKEN == 1:
                total += here_sum
            else:
                this = tl.arange(0, TAKEN)[:, None] == m
                result += tl.where(this, tl.sum(here_sum, 1)[None, :], 0.0)
    if TAKEN == 1:
        result += tl.sum(total, 1)[None, :]
    row = some + tl.arange(0, TAKEN)
    place_out = row[:, None].to(tl.int64) * outputs + (tile + output)[None, :]
    tl.store(out + place_out, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & fits[None, :])
