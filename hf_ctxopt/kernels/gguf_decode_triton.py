"""A weight in GGUF blocks decoded on a GPU, in the float operations of `weights/codecs.py`: equal bit for bit.

A program decodes some blocks of one weight; a thread takes bytes that lie side by side, so that what it writes does
too. Layouts: ggml `ggml-common.h`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton import language as tl

PROGRAM = 4096  # weights of a program
# Type -> (bits, whether blocks have minima, columns of a block, bytes of a block)
_FORMATS = {
    "Q4_K": (4, True, 256, 144), "Q5_K": (5, True, 256, 176), "Q6_K": (6, False, 256, 210),
    "Q8_0": (8, False, 32, 34), "Q4_0": (4, False, 32, 18), "Q4_1": (4, True, 32, 20),
    "Q5_0": (5, False, 32, 22), "Q5_1": (5, True, 32, 24),
}  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _byte(packed, place, mask):  # type: ignore[no-untyped-def]
    return tl.load(packed + place, mask=mask, other=0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _half(packed, place, mask):  # type: ignore[no-untyped-def]
    """The fp16 at an even byte, in float32."""
    halves = packed.to(tl.pointer_type(tl.float16))
    return tl.load(halves + place // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def decode_k(packed, out, blocks, BITS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_K and Q5_K: (blocks, bytes) uint8 to (blocks, 256)."""
    BYTES: tl.constexpr = 144 if BITS == 4 else 176
    first = tl.program_id(0).to(tl.int64) * COUNT
    packed += first * BYTES
    out += first * 256
    some = tl.arange(0, COUNT)
    live = some < blocks - first
    group, i = tl.arange(0, 8), tl.arange(0, 32)
    place = (some * BYTES)[:, None]
    late = (group >= 4)[None, :]
    head = place + 4 + (group & 3)[None, :]
    here = live[:, None] & (group >= 0)[None, :]
    a, b, c = _byte(packed, head, here), _byte(packed, head + 4, here), _byte(packed, head + 8, here)
    scale = tl.where(late, (c & 15) | ((a >> 2) & 48), a & 63)
    minimum = tl.where(late, (c >> 4) | ((b >> 2) & 48), b & 63)
    scale = _half(packed, some * BYTES, live)[:, None] * scale.to(tl.float32)
    minimum = _half(packed, some * BYTES + 2, live)[:, None] * minimum.to(tl.float32)
    here = here[:, :, None] & (i >= 0)[None, None, :]
    at = (place + BYTES - 128 + (group // 2 * 32)[None, :])[:, :, None] + i[None, None, :]
    code = (_byte(packed, at, here) >> ((group & 1) * 4)[None, :, None]) & 15
    if BITS == 5:
        fifth = _byte(packed, place[:, :, None] + 16 + i[None, None, :], live[:, None, None] & (i >= 0)[None, None, :])
        code = code | (((fifth >> group[None, :, None]) & 1) << 4)
    value = scale[:, :, None] * code.to(tl.float32) - minimum[:, :, None]
    to = (some * 256)[:, None, None] + (group * 32)[None, :, None] + i[None, None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def decode_q6(packed, out, blocks, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q6_K: (blocks, 210) uint8 to (blocks, 256)."""
    first = tl.program_id(0).to(tl.int64) * COUNT
    packed += first * 210
    out += first * 256
    some = tl.arange(0, COUNT)
    live = some < blocks - first
    group, i = tl.arange(0, 16), tl.arange(0, 16)
    half, quarter, side = group // 8, group % 8 // 2, group & 1
    here = live[:, None] & (group >= 0)[None, :]
    place = (some * 210)[:, None]
    scale = (_byte(packed, place + 192 + group[None, :], here) << 24) >> 24
    scale = _half(packed, some * 210 + 208, live)[:, None] * scale.to(tl.float32)
    here = here[:, :, None] & (i >= 0)[None, None, :]
    low = (place + (half * 64 + (quarter & 1) * 32 + side * 16)[None, :])[:, :, None] + i[None, None, :]
    up = (place + (128 + half * 32 + side * 16)[None, :])[:, :, None] + i[None, None, :]
    code = (_byte(packed, low, here) >> (quarter // 2 * 4)[None, :, None]) & 15
    code = code | (((_byte(packed, up, here) >> (quarter * 2)[None, :, None]) & 3) << 4)
    value = scale[:, :, None] * (code - 32).to(tl.float32)
    to = (some * 256)[:, None, None] + (group * 16)[None, :, None] + i[None, None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def decode_flat(packed, out, blocks, BITS: tl.constexpr, AFFINE: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of 32 weights: (blocks, bytes) uint8 to (blocks, 32)."""
    HEAD: tl.constexpr = 4 if AFFINE else 2
    CODES: tl.constexpr = HEAD + (4 if BITS == 5 else 0)
    BYTES: tl.constexpr = CODES + (32 if BITS == 8 else 16)
    first = tl.program_id(0).to(tl.int64) * COUNT
    packed += first * BYTES
    out += first * 32
    some = tl.arange(0, COUNT)
    live = some < blocks - first
    side, i = tl.arange(0, 2), tl.arange(0, 16)
    here = live[:, None, None] & (side >= 0)[None, :, None] & (i >= 0)[None, None, :]
    codes = (some * BYTES + CODES)[:, None, None] + i[None, None, :]
    if BITS == 8:
        code = (_byte(packed, codes + (side * 16)[None, :, None], here) << 24) >> 24
    else:
        code = (_byte(packed, codes + (side * 0)[None, :, None], here) >> (side * 4)[None, :, None]) & 15
        if BITS == 5:  # bit i of 32 is the fifth of weight i
            at = (some * BYTES + HEAD)[:, None, None] + (side * 2)[None, :, None] + (i // 8)[None, None, :]
            code = code | (((_byte(packed, at, here) >> (i & 7)[None, None, :]) & 1) << 4)
    factor = _half(packed, some * BYTES, live)[:, None, None]
    if AFFINE:
        value = factor * code.to(tl.float32) + _half(packed, some * BYTES + 2, live)[:, None, None]
    elif BITS == 8:
        value = factor * code.to(tl.float32)
    else:
        value = factor * (code - (1 << (BITS - 1))).to(tl.float32)
    to = (some * 32)[:, None, None] + (side * 16)[None, :, None] + i[None, None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=here)


def decode(packed: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, see `codecs.decode`.

    Args:
        packed: uint8 (rows, bytes of a row) at an even address.
        type: block type.
        dtype: of the result, rounded from float32.

    Returns:
        (rows, columns).
    """
    bits, affine, block, nbytes = _FORMATS[type]
    packed = packed.contiguous()
    if packed.data_ptr() % 16:  # a slice: the compiler takes what is at a multiple of 16 for a kernel of its own
        packed = packed.clone()
    blocks = packed.numel() // nbytes
    out = torch.empty(packed.shape[0], packed.shape[1] // nbytes * block, dtype=dtype, device=packed.device)
    count = PROGRAM // block
    grid = (-(-blocks // count),)
    # A product and a sum are rounded one by one, as torch does.
    common = {"COUNT": count, "num_warps": 4, "enable_fp_fusion": False}
    with torch.cuda.device(packed.device) if packed.is_cuda else nullcontext():
        if type == "Q6_K":
            decode_q6[grid](packed, out, blocks, **common)
        elif block == 256:
            decode_k[grid](packed, out, blocks, BITS=bits, **common)
        else:
            decode_flat[grid](packed, out, blocks, BITS=bits, AFFINE=affine, **common)
    return out
