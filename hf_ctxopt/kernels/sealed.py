"""Attention over quantized pages without building their K and V: scales are folded into queries and probabilities.

With `key = code * scale + zero` per channel of a page, `query · key = (query * scale) · code + query · zero`; with
`value = code * scale + zero` per token, the weighted sum is `(weights * scale) · codes + weights · zero`. Codes are
unpacked plane by plane and in pieces of `PIECE` tokens, so that what is unpacked stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1024  # tokens unpacked at once, per head


@dataclass(frozen=True)
class SealedTokens:
    """K or V of neighbouring sealed pages.

    Args:
        codes: `(kv_heads, pages, page_size, head_dim * bits / 8)` uint8, planes as in `pages/codec.py`; or the states
            themselves in a float dtype.
        scales: `(kv_heads, pages, 2, channels or tokens)` float16: scale and zero.
        bits: 8, 4, 2, or 16 for states.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    def scores(self, query: Tensor) -> Tensor:
        """Products of float32 queries `(kv_heads, rows, head_dim)` with all keys, `(kv_heads, rows, tokens)`."""
        heads, pages, size, _ = self.codes.shape
        found = query.new_empty(heads, query.shape[1], pages * size)
        step = max(1, PIECE // size)
        for first in range(0, pages, step):
            part = slice(first, min(first + step, pages))
            codes = self.codes[:, part]
            if self.bits == 16:
                piece = query @ codes.flatten(1, 2).to(query.dtype).transpose(1, 2)
            else:
                scale, zero = self.scales[:, part].to(query.dtype).unbind(2)
                # (heads, pages, rows, tokens) = one small product for each page
                folded = query[:, None] * scale[:, :, None]
                products = _sum_of_planes(folded, codes, self.bits)
                products += torch.matmul(query, zero.transpose(1, 2)).transpose(1, 2)[..., None]
                piece = products.transpose(1, 2).flatten(2)
            found[..., part.start * size : part.stop * size] = piece
        return found

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of all values by float32 weights `(kv_heads, rows, tokens)`, `(kv_heads, rows, head_dim)`."""
        heads, pages, size, _ = self.codes.shape
        total: Tensor | None = None
        step = max(1, PIECE // size)
        for first in range(0, pages, step):
            part = slice(first, min(first + step, pages))
            codes = self.codes[:, part].flatten(1, 2)
            share = weights[..., part.start * size : part.stop * size]
            if self.bits == 16:
                piece = share @ codes.to(weights.dtype)
            else:
                scale, zero = self.scales[:, part].to(weights.dtype).unbind(2)
                folded = share * scale.flatten(1)[:, None]
                piece = torch.cat([folded @ plane for plane in _planes(codes, self.bits, weights.dtype)], dim=-1)
                piece += share @ zero.flatten(1)[..., None]
            total = piece if total is None else total.add_(piece)
        return weights.new_zeros(heads, weights.shape[1], 0) if total is None else total


def _planes(codes: Tensor, bits: int, dtype: torch.dtype) -> list[Tensor]:
    """The codes of each plane of channels as floats, `(..., head_dim / planes)`."""
    if bits == 8:
        return [codes.to(dtype)]
    last = 8 - bits
    return [((codes >> shift) if shift == last else (codes >> shift) & (2**bits - 1)).to(dtype)
            for shift in range(0, 8, bits)]  # fmt: skip


def _sum_of_planes(query: Tensor, codes: Tensor, bits: int) -> Tensor:
    planes = _planes(codes, bits, query.dtype)
    parts = query.chunk(len(planes), dim=-1)
    products = parts[0] @ planes[0].transpose(-1, -2)
    for part, plane in zip(parts[1:], planes[1:], strict=True):
        products += part @ plane.transpose(-1, -2)
    return products


@dataclass(frozen=True)
class SealedSegment:
    """Neighbouring tokens of one sequence in sealed pages; stands beside `attention.Segment`.

    Args:
        keys: K of the pages.
        values: V of the pages.
        skip: tokens of the first page before the segment.
        tokens: tokens of the segment.
        query: see `attention.Segment`.
    """

    keys: SealedTokens
    values: SealedTokens
    skip: int
    tokens: int
    query: Tensor | None = None

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.values.codes.shape[-1] * (8 // self.values.bits if self.values.bits < 16 else 1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.keys.codes.shape[0]

    def scores(self, query: Tensor) -> Tensor:
        """See `attention.Segment.scores`."""
        found = self.keys.scores(query)
        return found[..., self.skip : self.skip + self.tokens]

    def mix(self, weights: Tensor) -> Tensor:
        """See `attention.Segment.mix`."""
        whole = self.values.codes.shape[1] * self.values.codes.shape[2]
        if whole != self.tokens:
            rest = whole - self.skip - self.tokens
            weights = torch.nn.functional.pad(weights, (self.skip, rest))
        return self.values.mix(weights)
