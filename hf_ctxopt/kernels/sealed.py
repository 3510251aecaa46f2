"""Attention over quantized pages without building their K and V: scales are folded into queries and probabilities.

With `key = code * scale + zero` per channel of a page, `query · key = (query * scale) · code + query · zero`; with
`value = code * scale + zero` per token, the weighted sum is `(weights * scale) · codes + weights · zero`. Codes are
unpacked plane by plane and in pieces of `PIECE` codes, so that what is unpacked stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 1 << 18  # numbers up to which one thread alone unpacks faster
_SERIAL = (1 << 15) - 1  # elements up to which torch uses one thread (its grain size)
PIECE = 1 << 20  # codes unpacked at once, over all heads (4 MiB as floats)


@dataclass(frozen=True)
class SealedTokens:
    """K or V of neighbouring sealed pages.

    Args:
        codes: `(kv_heads, pages, page_size, head_dim * bits / 8)` uint8, planes as in `pages/codec.py`; or the states
            themselves in a float dtype.
        scales: `(kv_heads, pages, 2, channels or tokens)` float16: scale and zero.
        bits: 8, 4, 2, or 16 for states.
        over_tokens: scales are those of channels (K), else of tokens (V).
    """

    codes: Tensor
    scales: Tensor
    bits: int
    over_tokens: bool

    @property
    def tokens(self) -> int:
        """Tokens of all pages."""
        return self.codes.shape[1] * self.codes.shape[2]

    def decode(self, out: Tensor) -> None:
        """Write the states of all pages, `(kv_heads, tokens, head_dim)`, to `out`, float32."""
        pages = out.unflatten(1, self.codes.shape[1:3])
        if self.bits == 16:
            pages.copy_(self.codes)
            return
        axis = 2 if self.over_tokens else 3
        scale, zero = (part.unsqueeze(axis) for part in self.scales.to(out.dtype).unbind(2))
        if out.numel() > _FEW:
            _unpack(pages, self.codes, scale, zero, self.bits)
            return
        # Pieces too small for torch to share among threads: waking those costs more than the work there is.
        step = max(1, _SERIAL // pages[0, 0].numel())
        for head in range(pages.shape[0]):
            for first in range(0, pages.shape[1], step):
                at = (head, slice(first, first + step))
                _unpack(pages[at], self.codes[at], scale[at], zero[at], self.bits)

    def _pieces(self) -> list[slice]:
        """Cuts of the pages; one where they are few."""
        heads, pages, size, width = self.codes.shape
        step = max(1, PIECE * self.bits // (8 * heads * size * width)) if self.bits < 16 else pages
        return [slice(first, min(first + step, pages)) for first in range(0, pages, step)]

    def scores(self, query: Tensor) -> Tensor:
        """Products of float32 queries `(kv_heads, rows, head_dim)` with all keys, `(kv_heads, rows, tokens)`."""
        if self.bits == 16:
            return query @ self.codes.flatten(1, 2).to(query.dtype).transpose(1, 2)
        heads, pages, size, _ = self.codes.shape
        found = query.new_empty(heads, query.shape[1], pages, size)
        for part in self._pieces():
            scales = self.scales[:, part].to(query.dtype)  # (heads, pages, 2, head_dim)
            # One small product for each page: (heads, pages, rows, tokens).
            products = _sum_of_planes(query[:, None] * scales[:, :, :1], self.codes[:, part], self.bits)
            shift = query @ scales[:, :, 1].transpose(1, 2)
            torch.add(products.transpose(1, 2), shift[..., None], out=found[:, :, part])
        return found.flatten(2)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of all values by float32 weights `(kv_heads, rows, tokens)`, `(kv_heads, rows, head_dim)`."""
        if self.bits == 16:
            return weights @ self.codes.flatten(1, 2).to(weights.dtype)
        size, total = self.codes.shape[2], None
        for part in self._pieces():
            codes = self.codes[:, part].flatten(1, 2)
            scale, zero = self.scales[:, part].to(weights.dtype).unbind(2)
            share = weights[..., part.start * size : part.stop * size]
            folded = share * scale.flatten(1)[:, None]
            planes = [folded @ plane for plane in _planes(codes, self.bits, weights.dtype)]
            piece = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
            piece += share @ zero.flatten(1)[..., None]
            total = piece if total is None else total.add_(piece)
        if total is None:
            return weights.new_zeros(*weights.shape[:2], self.codes.shape[-1] * 8 // self.bits)
        return total


def _unpack(out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> None:
    """Write `code * scale + zero` to `out`, `(..., page_size, head_dim)` float32."""
    last = 8 - bits
    for shift, plane in zip(range(0, 8, bits), out.chunk(8 // bits, dim=-1), strict=True):
        part = codes if shift == 0 else codes >> shift
        plane.copy_(part if shift == last else part & (2**bits - 1))
    out.mul_(scale).add_(zero)


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

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """See `attention.Segment.copy_to`."""
        for part, out in ((self.keys, keys), (self.values, values)):
            if part.tokens == self.tokens:
                part.decode(out)
            else:
                whole = out.new_empty(out.shape[0], part.tokens, out.shape[2])
                part.decode(whole)
                out.copy_(whole[:, self.skip : self.skip + self.tokens])

    def scores(self, query: Tensor) -> Tensor:
        """See `attention.Segment.scores`."""
        found = self.keys.scores(query)
        return found[..., self.skip : self.skip + self.tokens]

    def mix(self, weights: Tensor) -> Tensor:
        """See `attention.Segment.mix`."""
        if self.values.tokens != self.tokens:
            rest = self.values.tokens - self.skip - self.tokens
            weights = torch.nn.functional.pad(weights, (self.skip, rest))
        return self.values.mix(weights)
