"""A few rows times a weight in blocks of 32 (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1), read in 16-bit words.

A thread takes half a block: 16 codes of Q8_0, or the low and high nibbles of 8 bytes. Layouts: ggml `ggml-common.h`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hf_ctxopt.kernels.gguf_parts_triton import half_of, load_pair


@triton.jit  # type: ignore[untyped-decorator]
def matmul_flat(  # type: ignore[no-untyped-def]
    x,
    packed,
    out,
    rows,
    outputs,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,  # blocks with a minimum: Q4_1, Q5_1
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
    BLOCKS: tl.constexpr = COLUMNS // 32
    HEAD: tl.constexpr = 2 if AFFINE else 1
    CODES: tl.constexpr = HEAD + (2 if BITS == 5 else 0)  # first word of the codes
    WORDS: tl.constexpr = CODES + (16 if BITS == 8 else 8)
    INNER: tl.constexpr = 8 if BITS == 8 else 4
    ALL: tl.constexpr = BLOCKS * 2
    STEPS: tl.constexpr = (ALL + CHUNKS - 1) // CHUNKS
    some = tl.program_id(1) * TAKEN + tl.arange(0, TAKEN)
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    start = output.to(tl.int64) * (BLOCKS * WORDS)
    fits = output < outputs
    live = some < rows
    inner = tl.arange(0, INNER)
    total = tl.zeros((TAKEN, TILE, CHUNKS), tl.float32)
    for step in tl.static_range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        valid = chunk < ALL
        block, side = chunk // 2, chunk % 2
        here = fits[:, None] & valid[None, :]
        head = start[:, None] + (block * WORDS)[None, :]
        codes = start[:, None, None] + (block * WORDS + CODES + side * INNER)[None, :, None] + inner[None, None, :]
        word = tl.load(packed + codes, mask=here[:, :, None], other=0).to(tl.int32)
        factor = half_of(tl.load(packed + head, mask=here, other=0).to(tl.int32))
        if EARLY and step == 0:
            tl.extra.cuda.gdc_wait()
        at = some[:, None, None] * (COLUMNS // 2) + (block * 16 + side * INNER)[None, :, None] + inner[None, None, :]
        given = live[:, None, None] & valid[None, :, None]
        first, second = load_pair(x, at, given, KIND)
        if BITS == 8:
            sums = first[:, None] * ((word << 24) >> 24).to(tl.float32)[None]
            sums += second[:, None] * ((word << 16) >> 24).to(tl.float32)[None]
            total += factor[None] * tl.sum(sums, 3)
        else:
            third, fourth = load_pair(x, at + 8, given, KIND)
            a, b = word & 15, (word >> 8) & 15
            c, d = (word >> 4) & 15, (word >> 12) & 15
            if BITS == 5:  # bit i of 32 is the fifth of weight i
                near = tl.load(packed + head + HEAD, mask=here, other=0).to(tl.int32) >> (side * 8)[None, :]
                far = tl.load(packed + head + HEAD + 1, mask=here, other=0).to(tl.int32) >> (side * 8)[None, :]
                near = near[:, :, None] >> (2 * inner)[None, None, :]
                far = far[:, :, None] >> (2 * inner)[None, None, :]
                a, b = a | (near & 1) << 4, b | (near & 2) << 3
                c, d = c | (far & 1) << 4, d | (far & 2) << 3
            sums = first[:, None] * a.to(tl.float32)[None] + second[:, None] * b.to(tl.float32)[None]
            sums += third[:, None] * c.to(tl.float32)[None] + fourth[:, None] * d.to(tl.float32)[None]
            given_sum = tl.sum(first + second + third + fourth, 2)[:, None]
            if AFFINE:
                minimum = half_of(tl.load(packed + head + 1, mask=here, other=0).to(tl.int32))
                total += factor[None] * tl.sum(sums, 3) + minimum[None] * given_sum
            else:
                total += factor[None] * (tl.sum(sums, 3) - (1 << (BITS - 1)) * given_sum)
    place_out = some[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(out + place_out, tl.sum(total, 2).to(out.dtype.element_ty), mask=live[:, None] & fits[None, :])
