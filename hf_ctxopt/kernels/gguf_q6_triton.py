"""A few rows times a Q6_K weight: blocks of 256 weights in sixteen groups with a signed 8-bit scale.

A block is 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 scales and an fp16 factor: 210 bytes, so only
16-bit loads are aligned. A thread takes 8 bytes of nibbles from either quarter of a half block and the 8 bytes of
pairs above them: 32 weights of four groups. Layout: ggml `ggml-common.h`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import half_of, load_pair

UNIT = tl.constexpr(64.0)  # codes of 6 bits on top of the mantissa of 1.0: 1 + code / 64


@triton.jit
def _code(nibbles, pairs, one):  # type: ignore[no-untyped-def]
    """1 + code / 64; `nibbles` has the low four bits in bits 0–3, `pairs` the upper two in bits 0–1."""
    return ((nibbles & 15) << 17 | (pairs & 3) << 21 | one).to(tl.float32, bitcast=True)


@triton.jit
def _scale(words, here, shift):  # type: ignore[no-untyped-def]
    """A signed 8-bit scale out of a 16-bit word: the low byte for a shift of 24, the high one for 16."""
    return ((tl.load(words, mask=here, other=0).to(tl.int32) << shift) >> 24).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _two(x, at, given, word, above, one, LOW: tl.constexpr, UP: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of two weights with the surplus 1 + 32 / 64 of their codes taken off."""
    first, second = load_pair(x, at, given, KIND)
    product = first * _code(word >> LOW, above >> UP, one) + second * _code(word >> (LOW + 8), above >> (UP + 8), one)
    return product - 1.5 * (first + second)


@triton.jit  # type: ignore[untyped-decorator]
def _group(x, at, given, n0, n1, n2, n3, u0, u1, u2, u3, one, LOW: tl.constexpr, UP: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of eight weights whose codes start at bit `LOW` of the nibbles and bit `UP` of the pairs."""
    total = _two(x, at, given, n0, u0, one, LOW, UP, KIND) + _two(x, at + 1, given, n1, u1, one, LOW, UP, KIND)
    return total + (
        _two(x, at + 2, given, n2, u2, one, LOW, UP, KIND) + _two(x, at + 3, given, n3, u3, one, LOW, UP, KIND)
    )


@triton.jit  # type: ignore[untyped-decorator]
def matmul_q6(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    one,  # the bits of 1.0
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    TAKEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[m, o] = sum over columns of x[m] times weight[o].

    Args:
        x: (rows, COLUMNS) as int32 words, or float32.
        packed: (outputs, bytes of a row / 2) int16.
        out: (rows, outputs).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = COLUMNS // 256
    ALL: tl.constexpr = BLOCKS * 8
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(0) * TAKEN
    tile = tl.program_id(1) * TILE
    output = tl.arange(0, TILE)
    packed += tile.to(tl.int64) * (BLOCKS * 105)
    start = output * (BLOCKS * 105)
    fits = tile + output < outputs
    row_of = tl.zeros((1, CHUNKS), tl.int32) + some
    total = tl.zeros((TILE, CHUNKS), tl.float32)
    result = tl.zeros((TAKEN, TILE), tl.float32)
    for step in tl.static_range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        block, place = chunk // 8, chunk % 8
        half, quarter = place // 4, place % 4
        here = fits[:, None] & valid[None, :]
        head = start[:, None] + (block * 105)[None, :]
        codes = head + (half * 32 + quarter * 4)[None, :]
        upper = head + (64 + half * 16 + quarter * 4)[None, :]
        scales = head + (96 + half * 4)[None, :]
        n0 = tl.load(packed + codes, mask=here, other=0).to(tl.int32)
        n1 = tl.load(packed + codes + 1, mask=here, other=0).to(tl.int32)
        n2 = tl.load(packed + codes + 2, mask=here, other=0).to(tl.int32)
        n3 = tl.load(packed + codes + 3, mask=here, other=0).to(tl.int32)
        f0 = tl.load(packed + codes + 16, mask=here, other=0).to(tl.int32)
        f1 = tl.load(packed + codes + 17, mask=here, other=0).to(tl.int32)
        f2 = tl.load(packed + codes + 18, mask=here, other=0).to(tl.int32)
        f3 = tl.load(packed + codes + 19, mask=here, other=0).to(tl.int32)
        u0 = tl.load(packed + upper, mask=here, other=0).to(tl.int32)
        u1 = tl.load(packed + upper + 1, mask=here, other=0).to(tl.int32)
        u2 = tl.load(packed + upper + 2, mask=here, other=0).to(tl.int32)
        u3 = tl.load(packed + upper + 3, mask=here, other=0).to(tl.int32)
        factor = half_of(tl.load(packed + head + 104, mask=here, other=0).to(tl.int32)) * UNIT
        shift = 24 - (quarter // 2 * 8)[None, :]
        s0 = _scale(packed + scales, here, shift) * factor
        s1 = _scale(packed + scales + 1, here, shift) * factor
        s2 = _scale(packed + scales + 2, here, shift) * factor
        s3 = _scale(packed + scales + 3, here, shift) * factor
        if EARLY and step == 0:
            tl.extra.cuda.gdc_wait()
        for m in tl.static_range(TAKEN):
            given = valid[None, :] & (row_of + m < rows)
            at = ((some + m) * (COLUMNS // 2) + block * 128 + half * 64 + quarter * 4)[None, :]
            done = s0 * _group(x, at, given, n0, n1, n2, n3, u0, u1, u2, u3, one, 0, 0, KIND)
            done += s1 * _group(x, at + 16, given, f0, f1, f2, f3, u0, u1, u2, u3, one, 0, 2, KIND)
            done += s2 * _group(x, at + 32, given, n0, n1, n2, n3, u0, u1, u2, u3, one, 4, 4, KIND)
            done += s3 * _group(x, at + 48, given, f0, f1, f2, f3, u0, u1, u2, u3, one, 4, 6, KIND)
            if TAKEN == 1:
                total += done
            else:
                this = tl.arange(0, TAKEN)[:, None] == m
                result += tl.where(this, tl.sum(done, 1)[None, :], 0.0)
    if TAKEN == 1:
        result += tl.sum(total, 1)[None, :]
    row = some + tl.arange(0, TAKEN)
    place_out = row[:, None].to(tl.int64) * outputs + (tile + output)[None, :]
    tl.store(out + place_out, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & fits[None, :])
