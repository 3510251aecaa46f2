"""How a full ("sealed") page is stored: 8, 4 or 2 bits per value with float16 scales.

A group is one channel over the page's tokens (K), or one token over its channels (V). All arithmetic is float32:

    low, high = min(group), max(group)
    margin    = (high - low) * MARGINS[part, bits]           # 0 at 8 and 4 bits
    zero      = float16(clamp(low + margin, -65504, 65504))
    scale     = float16(clamp(((high - margin) - zero) / (2**bits - 1), 6.2e-5, 65504))
    code      = clamp(round_half_to_even((value - zero) / scale), 0, 2**bits - 1)
    value     ≈ code * scale + zero

At 2 bits the outermost values are given up (`margin` from both ends of the range) for a finer step inside: on
SmolLM2's states that halves the error of what attention returns, and a search for the best range of each group gains
nothing over these constants (`benchmarks/quality.py`).

K has a scale and a zero for each channel over the page's tokens, V for each token over its channels, because K's
outliers sit in few channels and V's do not (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3). Codes are packed in
planes: of `n = 8 / bits` planes of `head_dim / n` channels, byte `e` of a token holds channel `e + i * head_dim / n`
in its bits `[bits * i, bits * (i + 1))`, so unpacking gives neighbouring channels and needs no shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGINS = {("k", 2): 0.05, ("v", 2): 0.125}
"""Share of a group's range left out at each end, by part and bits; 0 where nothing is given."""

_LEAST_SCALE = 6.2e-5  # the smallest normal float16: a constant channel must not divide by zero


@dataclass(frozen=True)
class Codec:
    """One part (K or V) of sealed pages.

    Args:
        bits: 8, 4 or 2; 16 keeps the states as they are.
        over_tokens: scales run over the page's tokens, one for each channel (K); otherwise over the channels, one
            for each token (V).
    """

    bits: int
    over_tokens: bool

    @property
    def margin(self) -> float:
        """Share of a group's range left out at each end."""
        return MARGINS.get(("k" if self.over_tokens else "v", self.bits), 0.0)

    @property
    def planes(self) -> int:
        """Values in a byte (of quantized codes)."""
        return max(1, 8 // self.bits)

    def code_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the codes of states of that dtype."""
        return dtype if self.bits == 16 else torch.uint8

    def code_shape(self, page_size: int, head_dim: int) -> tuple[int, int]:
        """Shape of a page's codes, `(page_size, bytes)`."""
        return page_size, head_dim // self.planes

    def scale_shape(self, page_size: int, head_dim: int) -> tuple[int, int]:
        """Shape of a page's scales: scale and zero of each channel or token."""
        if self.bits == 16:
            return 2, 0
        return 2, head_dim if self.over_tokens else page_size

    def page_bytes(self, page_size: int, head_dim: int, item: int) -> int:
        """Bytes of one head's page, scales included; `item` is the size of an element of the states."""
        values = page_size * (head_dim // self.planes) * (item if self.bits == 16 else 1)
        return values + 4 * self.scale_shape(page_size, head_dim)[1]

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of full pages.

        Args:
            states: `(..., page_size, head_dim)`, any float dtype.

        Returns:
            `(..., page_size, head_dim * bits / 8)` uint8 and `(..., 2, channels or tokens)` float16.
        """
        if self.bits == 16:
            return states, states.new_empty((*states.shape[:-2], 2, 0), dtype=torch.float16)
        wide = states.to(torch.float32)
        low, high = wide.aminmax(dim=-2 if self.over_tokens else -1, keepdim=True)
        if self.margin:
            margin = (high - low) * self.margin
            low, high = low + margin, high - margin
        # Scale and zero are rounded first and the codes found with what will be read back. A value outside of
        # float16 is brought to its edge: the codes around it stay finite.
        limit = torch.finfo(torch.float16).max
        zero = low.clamp(-limit, limit).to(torch.float16)
        step = (high - zero.float()) / (2**self.bits - 1)
        scale = step.clamp(_LEAST_SCALE, limit).to(torch.float16)
        codes = ((wide - zero.float()) / scale.float()).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        axis = -2 if self.over_tokens else -1
        # Stacked in float32, which holds them exactly: torch.autocast on a CPU knows no float16 beside bfloat16.
        scales = torch.stack([scale.float().squeeze(axis), zero.float().squeeze(axis)], dim=-2)
        return self._pack(codes), scales.to(torch.float16)

    def _pack(self, codes: Tensor) -> Tensor:
        first, *rest = codes.chunk(self.planes, dim=-1)
        packed = first.clone()
        for plane, part in enumerate(rest, 1):
            packed |= part << (self.bits * plane)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Codes `(..., head_dim)` uint8 of packed bytes `(..., head_dim * bits / 8)`."""
        if self.planes == 1:
            return packed
        mask = 2**self.bits - 1
        return torch.cat([(packed >> (self.bits * plane)) & mask for plane in range(self.planes)], dim=-1)

    def decode(self, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The states that codes stand for, `(..., page_size, head_dim)`.

        Args:
            packed: `(..., page_size, head_dim * bits / 8)`.
            scales: `(..., 2, channels or tokens)`.
            dtype: of the result; the arithmetic is float32.
        """
        if self.bits == 16:
            return packed.to(dtype)
        axis = -2 if self.over_tokens else -1
        scale, zero = (part.to(torch.float32).unsqueeze(axis) for part in scales.unbind(-2))
        return torch.addcmul(zero, self.unpack(packed).to(torch.float32), scale).to(dtype)
