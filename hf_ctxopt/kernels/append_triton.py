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


@triton.jit
def _queries(
    query, cos, sin, basis, out, dim_stride, head_stride, V: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, START: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BASIS: tl.constexpr,
):  # fmt: skip
    """The variants of `G` query heads; angles and `out` are those of the batch row, `out` from its first head on."""
    row, c = tl.arange(0, ROWS), tl.arange(0, PAD)
    variant, live = row // G, row < V * G
    read = query + (row % G * head_stride)[:, None]
    x = tl.load(read + c[None, :] * dim_stride, mask=live[:, None] & (c < DIM)[None, :], other=0.0)
    if HALF > 0:
        local = c - START
        if INTERLEAVED:
            partner, angle, first = local ^ 1, local // 2, local % 2 == 0
        else:
            first = local < HALF
            partner, angle = tl.where(first, local + HALF, local - HALF), local % HALF
        used = live[:, None] & ((local >= 0) & (local < 2 * HALF))[None, :]
        other = tl.load(read + (START + partner)[None, :] * dim_stride, mask=used, other=0.0).to(tl.float32)
        by = variant[:, None] * HALF + angle[None, :]
        sine = tl.load(sin + by, mask=used, other=0.0)
        turned = x.to(tl.float32) * tl.load(cos + by, mask=used, other=1.0)
        turned += tl.where(first[None, :], -sine, sine) * other
        x = tl.where(used, turned.to(x.dtype), x)
    _put(x, out + (variant * HEADS + row % G) * DIM, live, basis, DIM, PAD, BE, BASIS)


@triton.jit
def _state(
    states, pages, slot, basis, dim_stride, DIM: tl.constexpr, PAD: tl.constexpr, ONE: tl.constexpr,
    BE: tl.constexpr, BASIS: tl.constexpr,
):  # fmt: skip
    """One head's key or value to its slot; a matrix product takes `ONE` rows, of which the first is meant."""
    one, c = tl.arange(0, ONE), tl.arange(0, PAD)
    live = one < tl.where(slot >= 0, 1, 0)
    x = tl.load(
        states + one[:, None] * 0 + c[None, :] * dim_stride, mask=live[:, None] & (c < DIM)[None, :], other=0.0
    )
    _put(x, pages + (slot + one) * DIM, live, basis, DIM, PAD, BE, BASIS)


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
    batch, head = (at // H).to(tl.int64), (at % H).to(tl.int64)
    if part == 0:
        _queries(
            query + batch * q_batch + head * G * q_head, cos + batch * (V * HALF), sin + batch * (V * HALF), key_basis,
            out + (batch * V * H + head) * (G * DK), q_dim, q_head, V, G, H * G, DK, DKP, ROWS, BE, START, HALF,
            INTERLEAVED, KEY_BASIS,
        )  # fmt: skip
    elif part == 1:
        _state(
            keys + batch * k_batch + head * k_head, raw_keys + head * tokens * DK, tl.load(slots + batch).to(tl.int64),
            key_basis, k_dim, DK, DKP, ONE, BE, KEY_BASIS,
        )  # fmt: skip
    else:
        _state(
            values + batch * v_batch + head * v_head, raw_values + head * tokens * DV,
            tl.load(slots + batch).to(tl.int64), value_basis, v_dim, DV, DVP, ONE, BE, VALUE_BASIS,
        )  # fmt: skip


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
