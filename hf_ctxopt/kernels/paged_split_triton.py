# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""One split of the paged decode attention: a program reads its share of one row's pages for one KV head.

Query rows of a program are the pairs (variant, group), `variant * G + group`. A program reads either raw or sealed
pages; how many programs read which follows from the row state on the device, so one grid serves every length.
Partial outputs carry log2-sum-exps; `paged_combine_triton` merges them.
"""

import triton
import triton.language as tl

from hf_ctxopt.kernels.paged_page_triton import exp2, logits, store_pages
from hf_ctxopt.kernels.paged_sealed_triton import sealed_part

# A raw page moves more bytes than a sealed one, but sealed bytes cost unpacking: their time per page is nearer.
RAW_WEIGHT = tl.constexpr(2)


@triton.jit
def raw_part(
    query, keys, values, row_table, state, partial, lse, page_lse, first, last, scaling, cap, width,
    H: tl.constexpr, V: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr,
    SHARES: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over the row's raw pages `[first, last)`, counted over raw pages only."""
    entries, sealed_from, sealed_to = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    sink_entries, jump = tl.load(state + 3), tl.load(state + 4)
    VG: tl.constexpr = V * G
    row, t = tl.arange(0, ROWS), tl.arange(0, BN)
    c, d = tl.arange(0, DKP), tl.arange(0, DVP)
    place = (row // G) * (H * G) + row % G  # of a query row in (V, H * G)
    q = tl.load(query + place[:, None] * DK + c[None, :], mask=(row < VG)[:, None] & (c < DK)[None, :], other=0.0)
    q = q.to(keys.dtype.element_ty)
    start = tl.load(state + 8 + 2 * (row // G), mask=row < VG, other=0)
    stop = tl.load(state + 9 + 2 * (row // G), mask=row < VG, other=0)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DVP), tl.float32)
    for base in range(first, last, BN // P):
        index = base + t // P
        live = index < last
        entry = tl.minimum(tl.where(index < sealed_from, index, index + sealed_to - sealed_from), entries - 1)
        token = (entry + tl.where(entry >= sink_entries, jump, 0)) * P + t % P
        slot = tl.load(row_table + entry).to(tl.int64) * P + t % P
        # Slots that no variant sees may hold anything: their scores are replaced, their values are not read.
        seen = token < 0
        for variant in tl.static_range(V):
            seen |= (token >= tl.load(state + 8 + 2 * variant)) & (token < tl.load(state + 9 + 2 * variant))
        seen &= live
        if DKP == DK:
            k = tl.load(keys + slot[None, :] * DK + c[:, None])
        else:
            k = tl.load(keys + slot[None, :] * DK + c[:, None], mask=(c < DK)[:, None], other=0.0)
        v = tl.load(values + slot[:, None] * DV + d[None, :], mask=seen[:, None] & (d < DV)[None, :], other=0.0)
        s = logits(tl.dot(q, k, input_precision=PRECISION), scaling, cap, CAP)
        sees = live[None, :] & (token[None, :] >= start[:, None]) & (token[None, :] < stop[:, None])
        s = tl.where(sees, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        decay = exp2(peak - higher, FAST)
        w = exp2(s - higher[:, None], FAST)
        total = total * decay + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = higher
        if SHARES:
            n = tl.arange(0, BN // P) + base
            at = tl.where(n < sealed_from, n, n + sealed_to - sealed_from)
            store_pages(page_lse, w, peak, at, n < last, row, width, VG, ROWS, BN // P, P)
    out = acc / tl.maximum(total, 1e-38)[:, None]
    tl.store(partial + row[:, None] * DV + d[None, :], out, mask=(row < VG)[:, None] & (d < DV)[None, :])
    tl.store(lse + row, tl.where(total > 0, tl.log2(tl.maximum(total, 1e-38)) + peak, float("-inf")), mask=row < VG)


@triton.jit(do_not_specialize=["raw_pages", "sealed_pages", "width", "state_width"])
def split_kernel(
    query, raw_keys, raw_values, k_codes, k_scales, v_codes, v_scales, table, rows, partial, lse, page_lse, scaling,
    cap, raw_pages, sealed_pages, width, state_width, H: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, BN: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, UK: tl.constexpr, UV: tl.constexpr,
    UKP: tl.constexpr, UVP: tl.constexpr, CAP: tl.constexpr, SHARES: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * H, splits)`; writes `partial (batch, H, splits, V, G, DV)` and `lse`, the same without `DV`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # the merge may be started: it waits by itself
    pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = pair // H, (pair % H).to(tl.int64)
    state = rows + batch * state_width
    row_table = table + batch.to(tl.int64) * width
    query += (batch * V * H + head) * (G * DK)
    at = (pair * splits + split).to(tl.int64) * (V * G)
    page_lse += pair.to(tl.int64) * (V * G) * width
    sealed = tl.load(state + 2) - tl.load(state + 1)
    raw = tl.load(state) - sealed
    readers = splits  # programs that read raw pages
    if KB > 0:
        cost = raw * RAW_WEIGHT
        readers = tl.cdiv(cost * splits, tl.maximum(cost + sealed, 1))
        readers = tl.minimum(tl.maximum(readers, tl.where(raw > 0, 1, 0)), tl.where(sealed > 0, splits - 1, splits))
    if split < readers:
        tiles = tl.cdiv(raw, BN // P)
        first = (tiles * split // readers) * (BN // P)
        last = tl.minimum((tiles * (split + 1) // readers) * (BN // P), raw)
        raw_part(
            query, raw_keys + head * raw_pages * (P * DK), raw_values + head * raw_pages * (P * DV), row_table, state,
            partial + at * DV, lse + at, page_lse, first, last, scaling, cap, width, H, V, G, P, DK, DV, DKP, DVP,
            ROWS, BN, CAP, SHARES, FAST, PRECISION,
        )  # fmt: skip
    elif KB > 0:
        share = split - readers
        others = tl.maximum(splits - readers, 1)
        sealed_part(
            query, k_codes + head * sealed_pages * (P * UK), k_scales + head * sealed_pages * DK,
            v_codes + head * sealed_pages * (P * UV), v_scales + head * sealed_pages * (2 * P), row_table, state,
            partial + at * DV, lse + at, page_lse, sealed * share // others, sealed * (share + 1) // others, scaling,
            cap, width, H, V, G, P, DK, DV, COLS, KB, VB, UK, UV, UKP, UVP, CAP, SHARES, FAST,
        )  # fmt: skip
