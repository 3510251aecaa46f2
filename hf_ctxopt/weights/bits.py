"""Bits and halves of a block: nibbles, single bits, fp16 scales."""

from __future__ import annotations

import torch
from torch import Tensor


def from_half(pair: Tensor) -> Tensor:
    """uint8 (blocks, 2 n), little-endian fp16, as float32 (blocks, n)."""
    return pair.contiguous().view(torch.float16).float()


def to_half(values: Tensor) -> Tensor:
    """float32 (blocks, n) as little-endian fp16, uint8 (blocks, 2 n)."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 (a block of equal weights)."""
    return torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 (..., n) to codes 0–15 (..., 2 n): all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Inverse of `unpack_nibbles`."""
    low, high = codes.chunk(2, dim=-1)
    packed: Tensor = low | high << 4
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8 (blocks, n) to bits (blocks, 8 n), least significant first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits: Tensor = packed.unsqueeze(-1) >> shifts & 1
    return bits.flatten(1)


def pack_bits(bits: Tensor) -> Tensor:
    """Inverse of `unpack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    shifted: Tensor = bits.unflatten(-1, (-1, 8)) << shifts
    return shifted.sum(-1, dtype=torch.uint8)
