# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""Writing a one-token step into its pages and preparing its queries, in one launch. See `append.append_reference`."""

import triton
import triton.language as tl
from torch import Tensor

from hf_ctxopt.kernels.append import QueryTurn, check


@triton.jit
def _put(states, target, rows, basis, DIM: tl.constexpr, PAD: tl.constexpr, BE: tl.constexpr, BASIS: tl.constexpr):
    """Store `states` `(R, PAD)` at the row pointers `target` `(R,)` where `rows`, in another basis if there is one."""
    c = tl.arange(0, PAD)
    if BASIS:
        for first in tl.static_range(0, PAD, BE):  # a block of columns at a time: of 256 channels all do not fit
            e = first + tl.arange(0, BE)
            used = (c < DIM)[:, None] & (e < DIM)[None, :]
            matrix = tl.load(basis + c[:, None] * DIM + e[None, :], mask=used, other=0.0)
            turned = tl.dot(states, matrix, input_precision="ieee").to(states.dtype)
            tl.store(target[:, None] + e[None, :], turned, mask=rows[:, None] & (e < DIM)[None, :])
    else:
        tl.store(target[:, None] + c[None, :], states, mask=rows[:, None] & (c < DIM)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def append_kernel(
    query, keys, values, slots, raw_keys, raw_values, cos, sin, key_basis, value_basis, out, tokens,
    q_batch, q_head, q_dim, k_batch, k_head, k_dim, v_batch, v_head, v_dim,
    H: tl.constexpr, V: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr,
    DVP: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr, BE: tl.constexpr, START: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, KEY_BASIS: tl.constexpr, VALUE_BASIS: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * kv_heads, 3)`: the queries of a KV head, its key, its value. `tokens` are the slots of a head."""
    at, part = tl.program_id(0), tl.program_id(1)
    batch, head = at // H, at % H
    c = tl.arange(0, DKP)
    if part == 0:
        row = tl.arange(0, ROWS)
        variant, live = row // G, row < V * G
        read = query + (batch.to(tl.int64) * q_batch + (head * G + row % G) * q_head)[:, None]
        x = tl.load(read + c[None, :] * q_dim, mask=live[:, None] & (c < DK)[None, :], other=0.0)
        if HALF > 0:
            local = c - START
            if INTERLEAVED:
                partner, angle, first = local ^ 1, local // 2, local % 2 == 0
            else:
                first = local < HALF
                partner, angle = tl.where(first, local + HALF, local - HALF), local % HALF
            turns = (local >= 0) & (local < 2 * HALF)
            used = live[:, None] & turns[None, :]
            other = tl.load(read + (START + partner)[None, :] * q_dim, mask=used, other=0.0).to(tl.float32)
            by = (batch * V + variant)[:, None] * HALF + angle[None, :]
            sine = tl.load(sin + by, mask=used, other=0.0)
            turned = x.to(tl.float32) * tl.load(cos + by, mask=used, other=1.0)
            turned += tl.where(first[None, :], -sine, sine) * other
            x = tl.where(used, turned.to(x.dtype), x)
        place = ((batch * V + variant) * H + head) * G + row % G
        _put(x, out + place.to(tl.int64) * DK, live, key_basis, DK, DKP, BE, KEY_BASIS)
    else:
        slot = tl.load(slots + batch).to(tl.int64)
        one = tl.arange(0, ONE)
        writes = one < tl.where(slot >= 0, 1, 0)
        line = head.to(tl.int64) * tokens + slot + one
        if part == 1:
            k_read = keys + batch.to(tl.int64) * k_batch + head * k_head + one[:, None] * 0 + c[None, :] * k_dim
            k_new = tl.load(k_read, mask=writes[:, None] & (c < DK)[None, :], other=0.0)
            _put(k_new, raw_keys + line * DK, writes, key_basis, DK, DKP, BE, KEY_BASIS)
        else:
            d = tl.arange(0, DVP)
            v_read = values + batch.to(tl.int64) * v_batch + head * v_head + one[:, None] * 0 + d[None, :] * v_dim
            v_new = tl.load(v_read, mask=writes[:, None] & (d < DV)[None, :], other=0.0)
            _put(v_new, raw_values + line * DV, writes, value_basis, DV, DVP, BE, VALUE_BASIS)


def append(
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
    out: Tensor | None = None,
) -> Tensor:
    """Write each row's new token to its slot and return the variants of its query; see `append.append_reference`.

    Args:
        query: `(batch, heads, 1, key_dim)`, strided or not, as the next two.
        keys: `(batch, kv_heads, 1, key_dim)`.
        values: `(batch, kv_heads, 1, value_dim)`.
        slots: int32 or int64 `(batch,)`; negative: nothing is written.
        raw_keys: the open pages `(kv_heads, pages, page_size, key_dim)`.
        raw_values: `(kv_heads, pages, page_size, value_dim)`.
        turned: how far the variants are turned, or `None`.
        variants: how many.
        key_basis: `(key_dim, key_dim)`, or `None`.
        value_basis: `(value_dim, value_dim)`, or `None`.
        out: contiguous `(batch, variants, heads, key_dim)`, filled and returned; made here if `None`.

    Returns:
        `(batch, variants, heads, key_dim)` in the query's dtype.

    Raises:
        ConfigError: for shapes that do not belong together.
    """
    check(query, keys, values, slots, raw_keys, raw_values, turned, variants, key_basis, value_basis)
    batch, heads, _, key_dim = query.shape
    kv_heads, pages, size, value_dim = raw_values.shape
    if out is None:
        out = query.new_empty(batch, variants, heads, key_dim)
    groups, dot = heads // kv_heads, key_basis is not None or value_basis is not None
    least = 16 if dot else 1  # rows and channels of a matrix product
    cos, sin = (query, query) if turned is None else (turned.cos, turned.sin)  # not read without an angle
    append_kernel[(batch * kv_heads, 3)](
        query, keys, values, slots, raw_keys, raw_values, cos, sin, query if key_basis is None else key_basis,
        query if value_basis is None else value_basis, out, pages * size,
        query.stride(0), query.stride(1), query.stride(3), keys.stride(0), keys.stride(1), keys.stride(3),
        values.stride(0), values.stride(1), values.stride(3), H=kv_heads, V=variants, G=groups, DK=key_dim,
        DV=value_dim, DKP=_pad(key_dim, least), DVP=_pad(value_dim, least), ROWS=_pad(variants * groups, least),
        ONE=least, BE=min(64, _pad(min(key_dim, value_dim), least)), START=0 if turned is None else turned.start,
        HALF=0 if turned is None else cos.shape[-1], INTERLEAVED=turned is not None and turned.interleaved,
        KEY_BASIS=key_basis is not None, VALUE_BASIS=value_basis is not None, num_warps=4,
    )  # fmt: skip
    return out


def _pad(size: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << max(size - 1, 0).bit_length())
