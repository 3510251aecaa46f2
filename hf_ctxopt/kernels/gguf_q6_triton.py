"""A few rows times a Q6_K weight: blocks of 256 weights in sixteen groups with a signed 8-bit scale.

A block is 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 scales and an fp16 factor: 210 bytes, so only
16-bit loads are aligned. A thread takes 8 bytes of nibbles from either quarter of a half block and the 8 bytes of
pairs above them: 32 weights of four groups. Layout: ggml `ggml-common.h`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import half_of, load_pair

ONE = tl.constexpr(0x3F800000)
UNIT = tl.constexpr(64.0)  # codes of 6 bits on top of the mantissa of 1.0: 1 + code / 64


@triton.jit  # type: ignore[untyped-decorator]
def _code(nibbles, pairs):  # type: ignore[no-untyped-def]
    """1 + code / 64; `nibbles` has the low four bits in bits 0–3, `pairs` the upper two in bits 0–1."""
    return ((nibbles & 15) << 17 | (pairs & 3) << 21 | ONE).to(tl.float32, bitcast=True)


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
    some = tl.program_id(0) * TAKEN + tl.arange(0, TAKEN)
    output = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = output.to(tl.int64) * (BLOCKS * 105)
    fits = output < outputs
    live = some < rows
    inner = tl.arange(0, 4)
    total = tl.zeros((TAKEN, TILE, CHUNKS), tl.float32)
    for step in tl.static_range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        block, place = chunk // 8, chunk % 8
        half, quarter = place // 4, place % 4
        here = fits[:, None] & valid[None, :]
        head = start[:, None] + (block * 105)[None, :]
        codes = start[:, None, None] + (block * 105 + half * 32 + quarter * 4)[None, :, None] + inner[None, None, :]
        upper = start[:, None, None] + (block * 105 + 64 + half * 16 + quarter * 4)[None, :, None]
        upper = upper + inner[None, None, :]
        near = tl.load(packed + codes, mask=here[:, :, None], other=0).to(tl.int32)
        far = tl.load(packed + codes + 16, mask=here[:, :, None], other=0).to(tl.int32)
        pairs = tl.load(packed + upper, mask=here[:, :, None], other=0).to(tl.int32)
        factor = half_of(tl.load(packed + head + 104, mask=here, other=0).to(tl.int32))
        scales = head + 96 + (half * 4)[None, :]
        if EARLY and step == 0:
            tl.extra.cuda.gdc_wait()
        at = some[:, None, None] * (COLUMNS // 2) + (block * 128 + half * 64 + quarter * 4)[None, :, None]
        at = at + inner[None, None, :]
        given = live[:, None, None] & valid[None, :, None]
        shift = ((quarter // 2) * 8)[None, :]
        for part in tl.static_range(4):
            first, second = load_pair(x, at + 16 * part, given, KIND)
            nibbles = (near if part % 2 == 0 else far) >> (4 * (part // 2))
            above = pairs >> (2 * part)
            sums = first[:, None] * _code(nibbles, above)[None]
            sums += second[:, None] * _code(nibbles >> 8, above >> 8)[None]
            scale = tl.load(packed + scales + part, mask=here, other=0).to(tl.int32) >> shift
            scale = ((scale << 24) >> 24).to(tl.float32) * factor
            # code / 64 + 1 is wanted as code - 32: the surplus is 1 + 32 / 64
            surplus = 1.5 * tl.sum(first + second, 2)
            total += (scale * UNIT)[None] * (tl.sum(sums, 3) - surplus[:, None])
    place_out = some[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(out + place_out, tl.sum(total, 2).to(out.dtype.element_ty), mask=live[:, None] & fits[None, :])
