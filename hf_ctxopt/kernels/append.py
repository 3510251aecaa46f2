"""Writing a one-token step into its pages and preparing its queries: the arguments and the plain-torch reference.

Slots and angles are device tensors of fixed shape, so that one captured launch serves every step.
`append_triton.append` takes the same arguments and must leave the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.rotate import RotaryFacts, turn


@dataclass(frozen=True)
class QueryTurn:
    """How far each variant of a row's query is turned, and which channels turn (see `rotate.RotaryFacts`).

    Args:
        cos: float32 `(batch, variants, rotary_dim / 2)`; 1 where a variant stays as it is.
        sin: likewise; 0 where a variant stays as it is.
        start: first rotated channel of the head.
        interleaved: pairs are channels (0, 1), (2, 3) … instead of (0, n/2), (1, n/2 + 1) ….
    """

    cos: Tensor
    sin: Tensor
    start: int = 0
    interleaved: bool = False


def append_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    raw_keys: Tensor,
    raw_values: Tensor,
    turned: QueryTurn | None = None,
    variants: int = 1,
    key_basis: Tensor | None = None,
    value_basis: Tensor | None = None,
) -> Tensor:
    """Write each row's new token to its slot and return the variants of its query.

    Args:
        query: `(batch, heads, 1, key_dim)`, embedded with its position; may be strided, as the next two.
        keys: `(batch, kv_heads, 1, key_dim)`, likewise.
        values: `(batch, kv_heads, 1, value_dim)`.
        slots: int32 or int64 `(batch,)`, token slots `page * page_size + offset` of the open pages; a row with a
            negative one writes nothing.
        raw_keys: the open pages `(kv_heads, pages, page_size, key_dim)`, written in place.
        raw_values: `(kv_heads, pages, page_size, value_dim)`, written in place.
        turned: how far the variants are turned; `None` leaves each as it is (layers without rotation).
        variants: how many the caller wants.
        key_basis: orthogonal `(key_dim, key_dim)` in the states' dtype: K is stored as `key @ key_basis`, and the
            queries are turned likewise (after `turned`).
        value_basis: likewise for V; the caller turns the attention's output back.

    Returns:
        `(batch, variants, heads, key_dim)` in the query's dtype.

    Raises:
        ConfigError: for shapes that do not belong together.
    """
    check(query, keys, values, slots, raw_keys, raw_values, turned, variants, key_basis, value_basis)
    rows = (slots >= 0).nonzero()[:, 0]
    where = slots[rows].long()
    for new, pages, basis in ((keys, raw_keys, key_basis), (values, raw_values, value_basis)):
        stored = new[rows, :, 0] if basis is None else new[rows, :, 0] @ basis
        pages.flatten(1, 2)[:, where] = stored.transpose(0, 1)
    out = query[:, None, :, 0].expand(-1, variants, -1, -1)
    if turned is not None:
        facts = RotaryFacts(lambda: turned.cos, turned.start, turned.interleaved)
        out = turn(out, turned.cos[:, :, None], turned.sin[:, :, None], facts)
    return out.contiguous() if key_basis is None else out @ key_basis


def check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    raw_keys: Tensor,
    raw_values: Tensor,
    turned: QueryTurn | None,
    variants: int,
    key_basis: Tensor | None,
    value_basis: Tensor | None,
) -> None:
    """`ConfigError` unless the arguments of `append` belong together."""
    batch, heads, tokens, key_dim = query.shape
    kv_heads, _, _, value_dim = raw_values.shape
    if tokens != 1 or heads % kv_heads or key_dim != raw_keys.shape[-1]:
        raise ConfigError("query", tuple(query.shape), f"(batch, n * {kv_heads} heads, 1, {raw_keys.shape[-1]})")
    for name, states, dim in (("keys", keys, key_dim), ("values", values, value_dim)):
        if states.shape != (batch, kv_heads, 1, dim):
            raise ConfigError(name, tuple(states.shape), f"{(batch, kv_heads, 1, dim)}")
    if slots.shape != (batch,) or slots.dtype not in (torch.int32, torch.int64):
        raise ConfigError("slots", (tuple(slots.shape), slots.dtype), f"int32 or int64 ({batch},)")
    if raw_keys.shape[:3] != raw_values.shape[:3] or not (raw_keys.is_contiguous() and raw_values.is_contiguous()):
        raise ConfigError("raw_keys", tuple(raw_keys.shape), "contiguous pages like those of V")
    if turned is not None:
        shape, half = turned.cos.shape, turned.cos.shape[-1]
        if not (turned.cos.is_contiguous() and turned.sin.is_contiguous()):
            raise ConfigError("turned", "strided angles", "contiguous tensors")
        if shape != turned.sin.shape or shape[:2] != (batch, variants) or turned.start + 2 * half > key_dim:
            raise ConfigError("turned", tuple(shape), f"({batch}, {variants}, at most {key_dim - turned.start} / 2)")
    for name, basis, dim in (("key_basis", key_basis, key_dim), ("value_basis", value_basis, value_dim)):
        if basis is None:
            continue
        if basis.shape != (dim, dim) or basis.dtype != raw_keys.dtype or not basis.is_contiguous():
            raise ConfigError(name, (tuple(basis.shape), basis.dtype), f"contiguous {(dim, dim)}, {raw_keys.dtype}")
