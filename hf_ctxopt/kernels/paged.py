"""Decode attention over a page table: its arguments and the plain-torch float32 reference.

One query token per row. All state of a row lies in `table` and `rows`, device tensors of fixed shape, so that one
captured launch serves growing lengths. `paged_triton.decode` takes the same arguments and must give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_ctxopt.errors import ConfigError

HEADER = 8  # columns of `rows` before the visible ranges


@dataclass(frozen=True)
class SealedPages:
    """Encoded pages of one layer. Packing is planar: with `n = 8 / bits` planes of `dim / n` channels, byte `e` of a
    token holds in bits `[bits * i, bits * (i + 1))` the code of channel `e + i * dim / n`.

    Args:
        k_codes: uint8 `(kv_heads, pages, page_size, key_dim * k_bits / 8)`.
        k_scales: float16 `(kv_heads, pages, 2, key_dim)`, scale and zero per channel: `key = code * scale + zero`.
        v_codes: uint8 `(kv_heads, pages, page_size, value_dim * v_bits / 8)`.
        v_scales: float16 `(kv_heads, pages, 2, page_size)`, scale and zero per token.
    """

    k_codes: Tensor
    k_scales: Tensor
    v_codes: Tensor
    v_scales: Tensor

    @property
    def k_bits(self) -> int:
        """Bits of a key's code."""
        return 8 * self.k_codes.shape[-1] // self.k_scales.shape[-1]


@dataclass(frozen=True)
class PagedStates:
    """Keys and values of one layer.

    Args:
        raw_keys: `(kv_heads, pages, page_size, key_dim)` in the model's dtype.
        raw_values: `(kv_heads, pages, page_size, value_dim)`.
        sealed: the encoded pages; `None` where pages are never encoded.
    """

    raw_keys: Tensor
    raw_values: Tensor
    sealed: SealedPages | None = None

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return self.raw_keys.shape[2]

    @property
    def v_bits(self) -> int:
        """Bits of a sealed value's code, 0 without sealed pages."""
        return 0 if self.sealed is None else 8 * self.sealed.v_codes.shape[-1] // self.raw_values.shape[-1]

    @property
    def k_bits(self) -> int:
        """Bits of a sealed key's code, 0 without sealed pages."""
        return 0 if self.sealed is None else self.sealed.k_bits


PAGE_SIZES = (16, 32, 64, 128)
"""Page sizes that the kernels read."""


def refusal(raw_keys: Tensor, bits: tuple[int, int] | None) -> str | None:
    """Why the kernels cannot read a layer's pages; `None` if they can.

    Args:
        raw_keys: `(kv_heads, pages, page_size, key_dim)`.
        bits: of sealed K and V; `None` where pages are never sealed.

    Consumer cards give a program 99 KiB of shared memory, a T4 64 KiB.
    """
    if raw_keys.shape[2] not in PAGE_SIZES:
        return f"page_size {raw_keys.shape[2]} is not one of {PAGE_SIZES}"
    if raw_keys.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{raw_keys.dtype} states"
    if bits is not None and any(part not in (8, 4, 2) for part in bits):
        return f"K at {bits[0]} and V at {bits[1]} bits: both or none must be quantized"
    room, needed = shared_room(raw_keys.device), tile_bytes(raw_keys)
    if room is not None and needed > room:
        size, dim = raw_keys.shape[2:]
        return f"pages of {size} tokens with {dim} channels need {needed >> 10} KiB of a program's {room >> 10} KiB"
    return None


def tile_bytes(raw_keys: Tensor) -> int:
    """Shared memory of a program that reads these pages: one page of K and V, channels padded, and what is merged.

    An upper bound, held against every head and page size compiled for compute capability 8.9.
    """
    size, dim = raw_keys.shape[2:]
    return 2 * size * (1 << (dim - 1).bit_length()) * raw_keys.element_size() + (16 << 10)


@cache
def shared_room(device: torch.device) -> int | None:
    """Bytes of shared memory that one program may have; `None` where that is not known."""
    if device.type != "cuda":
        return None
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def variants_of(rows: Tensor) -> int:
    """How many query variants the row state describes."""
    variants, rest = divmod(rows.shape[1] - HEADER, 2)
    if rest or variants < 1:
        raise ConfigError("rows", tuple(rows.shape), f"{HEADER} columns and two more for each query variant")
    return variants


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., bytes)` as int16 `(..., channels)`, in the order of the channels."""
    planes = [(codes.to(torch.int16) >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-1)


def decode_reference(
    query: Tensor,
    pages: PagedStates,
    table: Tensor,
    rows: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over the pages of its row, in float32.

    Args:
        query: `(batch, variants, heads, key_dim)`; variant `v` is compared with the tokens of range `v` only.
        pages: the layer's pages.
        table: int32 `(batch, entries)`, pages in text order; raw page `r` is `r`, sealed page `s` is `-1 - s`.
        rows: int32 `(batch, 8 + 2 * variants)`: entries, first and one past the last sealed entry, entries of the
            sink, logical pages left out after the sink, three unused, then `from, to` of each variant in tokens.
        scaling: factor on the scores.
        softcap: Gemma 2's `softcap * tanh(score / softcap)`.
        sink_logits: `(heads,)`, an extra logit per head that carries no value.

    Returns:
        The output `(batch, heads, value_dim)` and each entry's share of the attention `(batch, heads, entries)`.
    """
    batch, variants, heads, _ = query.shape
    kv_heads, _, size, value_dim = pages.raw_values.shape
    groups = heads // kv_heads
    out = torch.zeros(batch, heads, value_dim, device=query.device)
    shares = torch.zeros(batch, heads, table.shape[1], device=query.device)
    for row, state in enumerate(rows.tolist()):
        entries, sink_entries, jump = state[0], state[3], state[4]
        if not entries:
            continue
        read = [page_states(pages, reference) for reference in table[row, :entries].tolist()]
        keys = torch.cat([page[0] for page in read], dim=1).repeat_interleave(groups, dim=0)
        values = torch.cat([page[1] for page in read], dim=1).repeat_interleave(groups, dim=0)
        entry = torch.arange(entries, device=query.device).repeat_interleave(size)
        logical = torch.where(entry < sink_entries, entry, entry + jump)
        token = logical * size + torch.arange(entries * size, device=query.device) % size
        scores = torch.full((heads, entries * size), -torch.inf, device=query.device)
        for variant in range(variants):
            start, stop = state[HEADER + 2 * variant : HEADER + 2 * variant + 2]
            part = torch.einsum("hd,htd->ht", query[row, variant].float(), keys) * scaling
            if softcap is not None:
                part = softcap * torch.tanh(part / softcap)
            scores = torch.where((token >= start) & (token < stop), part, scores)
        seen = (scores > -torch.inf).any(0)
        if not seen.any():
            continue
        extra = scores.new_full((heads, 1), -torch.inf) if sink_logits is None else sink_logits.float()[:, None]
        weights = torch.cat([scores, extra], dim=1).softmax(-1)[:, :-1]
        # What no query sees may be memory that nothing was written to, NaN included.
        out[row] = torch.einsum("ht,htd->hd", weights, values.masked_fill(~seen[None, :, None], 0))
        shares[row, :, :entries] = weights.view(heads, entries, size).sum(-1)
    return out, shares


def page_states(pages: PagedStates, reference: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one page in float32, `(kv_heads, page_size, dim)` each."""
    if reference >= 0:
        return pages.raw_keys[:, reference].float(), pages.raw_values[:, reference].float()
    if pages.sealed is None:
        raise ConfigError("table", reference, "raw pages (0 and up): this layer has no sealed ones")
    page, sealed = -1 - reference, pages.sealed
    k_scale, k_zero = sealed.k_scales[:, page].float().unbind(1)
    v_scale, v_zero = sealed.v_scales[:, page].float().unbind(1)
    keys = unpack(sealed.k_codes[:, page], pages.k_bits).float() * k_scale[:, None] + k_zero[:, None]
    values = unpack(sealed.v_codes[:, page], pages.v_bits).float() * v_scale[..., None] + v_zero[..., None]
    return keys, values
