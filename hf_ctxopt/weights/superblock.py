"""Blocks of 256 weights in groups with their own small scales: Q4_K and Q5_K (8 groups of 32), Q6_K (16 of 16).

Layouts: ggml `ggml-common.h` (`block_q4_K` and its like). The block has one fp16 scale (and one for the minima); each
group has a 6-bit (Q6_K: 8-bit signed) multiple of it. Each decoder maps uint8 (blocks, nbytes) to float32
(blocks, 256), each encoder the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bits import from_half, inverse, to_half
from .search import affine_scales, symmetric_scale

REFITS = 2  # rounds of least squares for a block's two scales, after which its integers are chosen anew


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes (blocks, 12) to 8 scales and 8 minima of 6 bits, uint8 (blocks, 8) each."""
    low, middle, high = packed.chunk(3, dim=1)
    scales = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], dim=1)
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 2 & 48)], dim=1)
    return scales, minima


def _pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Inverse of `_unpack_scales`."""
    (s_low, s_high), (m_low, m_high) = scales.chunk(2, dim=1), minima.chunk(2, dim=1)
    low = s_low | (s_high & 48) << 2
    middle = m_low | (m_high & 48) << 2
    return torch.cat([low, middle, (s_high & 15) | (m_high & 15) << 4], dim=1)


def _unpack_pairs(packed: Tensor) -> Tensor:
    """Nibbles (blocks, 128) to codes (blocks, 8, 32): 32 bytes hold group 2 k low and group 2 k + 1 high."""
    rows = packed.unflatten(1, (4, 1, 32))
    return torch.cat([rows & 15, rows >> 4], dim=2).flatten(1, 2)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Inverse of `_unpack_pairs`."""
    rows = codes.unflatten(1, (4, 2))
    packed: Tensor = rows[:, :, 0] | rows[:, :, 1] << 4
    return packed.flatten(1)


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device) * step).to(torch.uint8).view(-1, 1)


def _decode_affine(blocks: Tensor, bits: int) -> Tensor:
    factors = from_half(blocks[:, :4])
    scales, minima = _unpack_scales(blocks[:, 4:16])
    codes = _unpack_pairs(blocks[:, -128:])
    if bits == 5:  # byte j of 32 holds the fifth bit of weight j of group k in its bit k
        codes = codes | (blocks[:, 16:48].unsqueeze(1) >> _shifts(8, 1, blocks) & 1) << 4
    scale = (factors[:, :1] * scales.float()).unsqueeze(-1)
    minimum = (factors[:, 1:] * minima.float()).unsqueeze(-1)
    return (scale * codes.float() - minimum).flatten(1)


def _encode_affine(weight: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    blocks, top = len(weight), (1 << bits) - 1
    groups = weight.view(-1, 32)
    if importance is None:
        counts = groups.square().mean(1, keepdim=True).sqrt() + groups.abs()
        reach = (-1.0, 1.0, 21) if bits == 4 else (-0.5, 1.0, 16)
    else:
        spread = 2 * weight.square().mean(1, keepdim=True)
        counts = (importance * (spread + weight.square()).sqrt()).view(-1, 32)
        reach = (-0.9, 0.9, 37)
    scale, minimum = (part.view(blocks, 8) for part in affine_scales(groups, counts, top, *reach))
    groups = groups.view(blocks, 8, 32)
    factor, base = scale.amax(1, keepdim=True) / 63, -minimum.amin(1, keepdim=True) / 63
    fit = _affine_codes(groups, counts.view_as(groups), scale, minimum, factor, base, top)
    for _ in range(REFITS):
        factor, base = _refit(groups, counts.view_as(groups), fit)
        again = _affine_codes(groups, counts.view_as(groups), scale, minimum, factor, base, top)
        better = again[-1] < fit[-1]
        fit = tuple(
            torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(again, fit, strict=True)
        )
    factor, base, multiples, depths, codes, _ = fit
    codes = codes.to(torch.uint8)
    parts = [to_half(factor), to_half(base), _pack_scales(multiples.to(torch.uint8), depths.to(torch.uint8))]
    if bits == 5:
        parts.append((codes >> 4 << _shifts(8, 1, codes)).sum(1, dtype=torch.uint8))
    return torch.cat([*parts, _pack_pairs(codes & 15)], dim=1)


def _affine_codes(
    groups: Tensor, counts: Tensor, scale: Tensor, minimum: Tensor, factor: Tensor, base: Tensor, top: int
) -> tuple[Tensor, ...]:
    """The block's integers for its two scales.

    Args:
        groups: float32 (blocks, 8, 32).
        counts: what each squared error counts, of the same shape.
        scale, minimum: of each group, (blocks, 8).
        factor, base: the block's scale of the scales and of the minima, (blocks, 1); rounded to fp16 here.
        top: largest code.

    Returns:
        factor, base, multiples (blocks, 8), depths (blocks, 8), codes (blocks, 8, 32), squared error (blocks,).
    """
    factor, base = from_half(to_half(factor)), from_half(to_half(base))
    multiples = (scale * inverse(factor)).round_().clamp_(0, 63)
    depths = (-minimum * inverse(base)).round_().clamp_(0, 63)
    step, shift = (factor * multiples).unsqueeze(-1), (base * depths).unsqueeze(-1)
    codes = ((groups + shift) * inverse(step)).round_().clamp_(0, top)
    error = (codes * step - shift - groups).square_().mul_(counts).sum((1, 2))
    return factor, base, multiples, depths, codes, error


def _refit(groups: Tensor, counts: Tensor, fit: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The least-squares `factor` and `base` of a block for the integers that it has: two unknowns per block."""
    factor, base, multiples, depths, codes, _ = fit
    rise, fall = multiples.unsqueeze(-1) * codes, depths.unsqueeze(-1)
    counted = counts * rise
    rr, rf = (counted * rise).sum((1, 2)), (counted * fall).sum((1, 2))
    xr = (counted * groups).sum((1, 2))
    ff, xf = (counts * fall * fall).sum((1, 2)), (counts * fall * groups).sum((1, 2))
    determinant = rr * ff - rf * rf
    solvable = determinant > 1e-6 * rr * ff
    divisor = torch.where(solvable, determinant, 1)
    both = (xr * ff - xf * rf) / divisor, (xr * rf - xf * rr) / divisor
    alone = xr / torch.where(rr > 0, rr, 1)  # no group has a minimum
    new_factor = torch.where(solvable, both[0], torch.where(ff == 0, alone, factor.view(-1)))
    new_base = torch.where(solvable, both[1], base.view(-1))
    return new_factor.clamp(min=0).unsqueeze(1), new_base.clamp(min=0).unsqueeze(1)


def _decode_q6(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].unflatten(1, (2, 1, 64))  # per half of 128: low nibbles of weights 0-63, high of 64-127
    low = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32) >> _shifts(4, 2, blocks) & 3
    codes = ((low | high << 4).to(torch.int8) - 32).view(-1, 16, 16)
    scale = from_half(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale.unsqueeze(-1) * codes.float()).flatten(1)


def _encode_q6(weight: Tensor, importance: Tensor | None) -> Tensor:
    blocks = len(weight)
    groups = weight.view(-1, 16)
    counts = groups.square() if importance is None else importance.view(-1, 16)
    scale = symmetric_scale(groups, counts, 32).view(blocks, 16)
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    factor = to_half(peak / -128)
    multiples = (scale * inverse(from_half(factor))).round().clamp_(-128, 127)
    held = (from_half(factor) * multiples).view(-1, 1)
    codes = (groups * inverse(held)).round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, 2, 4, 32)
    low, high = codes & 15, (codes >> 4 << _shifts(4, 2, codes)).sum(2, dtype=torch.uint8)
    nibbles = low[:, :, :2] | low[:, :, 2:] << 4
    multiples = multiples.to(torch.int8).view(torch.uint8)
    return torch.cat([nibbles.reshape(blocks, 128), high.reshape(blocks, 64), multiples, factor], dim=1)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_K": lambda blocks: _decode_affine(blocks, 4),
    "Q5_K": lambda blocks: _decode_affine(blocks, 5),
    "Q6_K": _decode_q6,
}
ENCODERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "Q4_K": lambda weight, importance: _encode_affine(weight, importance, 4),
    "Q5_K": lambda weight, importance: _encode_affine(weight, importance, 5),
    "Q6_K": _encode_q6,
}
