"""Blocks of 32 weights with one scale: Q4_0, Q5_0 and Q8_0 (scale only), Q4_1 and Q5_1 (scale and minimum).

Layouts: ggml `ggml-common.h` (`block_q4_0` and its like). Without an importance the codes are those of the reference
encoders (`quantize_row_q4_0_ref` …, and `gguf/quants.py`); with one, the scale is searched for (`search.py`).
Each decoder maps uint8 (blocks, nbytes) to float32 (blocks, 32), each encoder the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bits import from_half, inverse, pack_bits, pack_nibbles, to_half, unpack_bits, unpack_nibbles
from .search import affine_scales, symmetric_scale


def _decode_symmetric(blocks: Tensor, bits: int) -> Tensor:
    codes = unpack_nibbles(blocks[:, -16:])
    if bits == 5:
        codes = codes | unpack_bits(blocks[:, 2:6]) << 4
    return from_half(blocks[:, :2]) * (codes.to(torch.int8) - (1 << bits - 1)).float()


def _decode_affine(blocks: Tensor, bits: int) -> Tensor:
    codes = unpack_nibbles(blocks[:, -16:])
    if bits == 5:
        codes = codes | unpack_bits(blocks[:, 4:8]) << 4
    return from_half(blocks[:, :2]) * codes.float() + from_half(blocks[:, 2:4])


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return from_half(blocks[:, :2]) * blocks[:, 2:].view(torch.int8).float()


def _joined(halves: list[Tensor], codes: Tensor, bits: int) -> Tensor:
    """Block bytes of the scale halves and the codes, uint8 (blocks, 32)."""
    high = [pack_bits(codes >> 4)] if bits == 5 else []
    return torch.cat([*halves, *high, pack_nibbles(codes & 15)], dim=1)


def _encode_symmetric(weight: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    half = 1 << bits - 1
    if importance is None:
        peak = weight.gather(1, weight.abs().argmax(1, keepdim=True))
        scale = peak / -half
        codes = weight * inverse(scale) + (half + 0.5)
        codes = codes.trunc().clamp_(0, 2 * half - 1)
    else:
        scale = symmetric_scale(weight, _counts(weight, importance), half)
        codes = (weight * inverse(from_half(to_half(scale)))).round().clamp_(-half, half - 1) + half
    return _joined([to_half(scale)], codes.to(torch.uint8), bits)


def _encode_affine(weight: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    top = (1 << bits) - 1
    if importance is None:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = (high - low) / top
        codes = ((weight - low) * inverse(scale) + 0.5).trunc()
    else:
        scale, low = affine_scales(weight, _counts(weight, importance), top, free=True)
        held = from_half(to_half(low))
        codes = ((weight - held) * inverse(from_half(to_half(scale)))).round()
    return _joined([to_half(scale), to_half(low)], codes.clamp_(0, top).to(torch.uint8), bits)


def _counts(weight: Tensor, importance: Tensor) -> Tensor:
    """What an error counts: the column's importance, more for a large weight (ggml `quantize_row_q4_0_impl`)."""
    spread = weight.square().mean(1, keepdim=True)
    return importance * (spread + weight.square()).sqrt()


def _encode_q8_0(weight: Tensor, importance: Tensor | None) -> Tensor:
    """At eight bits a search gains nothing that matters: ggml ignores the importance too."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = weight * inverse(scale)
    # Halves go away from zero, as C's roundf; torch.round would take them to even.
    size = codes.abs()
    whole = size.floor()
    codes = codes.sign() * (whole + (2 * (size - whole)).floor())
    return torch.cat([to_half(scale), codes.to(torch.int8).view(torch.uint8)], dim=1)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": lambda blocks: _decode_symmetric(blocks, 4),
    "Q5_0": lambda blocks: _decode_symmetric(blocks, 5),
    "Q4_1": lambda blocks: _decode_affine(blocks, 4),
    "Q5_1": lambda blocks: _decode_affine(blocks, 5),
    "Q8_0": _decode_q8_0,
}
ENCODERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "Q4_0": lambda weight, importance: _encode_symmetric(weight, importance, 4),
    "Q5_0": lambda weight, importance: _encode_symmetric(weight, importance, 5),
    "Q4_1": lambda weight, importance: _encode_affine(weight, importance, 4),
    "Q5_1": lambda weight, importance: _encode_affine(weight, importance, 5),
    "Q8_0": _encode_q8_0,
}
