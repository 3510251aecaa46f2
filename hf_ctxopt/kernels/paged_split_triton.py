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
def raw_entry(index, sealed_from, sealed_to):
    """Entry of the row's raw page `index`, counted over raw pages only."""
    return tl.where(index < sealed_from, index, index + (sealed_to - sealed_from))


@triton.jit
def raw_part(
    query, keys, values, row_table, state, partial, lse, page_lse, reader, readers, scaling, cap, width,
    H: tl.constexpr, V: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, MIXED: tl.constexpr,
    CAP: tl.constexpr, SHARES: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention over every `readers`-th tile of the row's raw pages, counted over raw pages only.

    Without sealed pages (`MIXED`) the first page numbers do not wait for the row state: of a short row, the time is
    that of loads which wait for each other.
    """
    N: tl.constexpr = BN // P
    row, t = tl.arange(0, ROWS), tl.arange(0, BN)
    index = reader * N + t // P
    if not MIXED:
        ahead = tl.load(row_table + tl.minimum(index, width - 1))
    entries, sealed_from, sealed_to = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    sink_entries, jump = tl.load(state + 3), tl.load(state + 4)
    raw = entries - (sealed_to - sealed_from)
    VG: tl.constexpr = V * G
    c, d = tl.arange(0, DKP), tl.arange(0, DVP)
    place = (row // G) * (H * G) + row % G  # of a query row in (V, H * G)
    q = tl.load(query + place[:, None] * DK + c[None, :], mask=(row < VG)[:, None] & (c < DK)[None, :], other=0.0)
    q = q.to(keys.dtype.element_ty)
    start = tl.load(state + 8 + 2 * (row // G), mask=row < VG, other=0)
    stop = tl.load(state + 9 + 2 * (row // G), mask=row < VG, other=0)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DVP), tl.float32)
    for base in range(reader * N, raw, readers * N):
        index = base + t // P
        live = index < raw
        entry = raw_entry(index, sealed_from, sealed_to)
        token = (entry + tl.where(entry >= sink_entries, jump, 0)) * P + t % P
        # Columns past the row's entries may hold anything: page 0 is read in their place, and counts for nothing.
        if MIXED:
            page = tl.load(row_table + tl.minimum(entry, width - 1))
            slot = tl.where(live, page, 0).to(tl.int64) * P + t % P
        else:
            slot = tl.where(live, ahead, 0).to(tl.int64) * P + t % P
            ahead = tl.load(row_table + tl.minimum(index + readers * N, width - 1))
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
            n = tl.arange(0, N) + base
            at = raw_entry(n, sealed_from, sealed_to)
            store_pages(page_lse, w, peak, at, n < raw, row, width, VG, ROWS, N, P)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # the merge may be started: it waits by itself
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
        raw_part(
            query, raw_keys + head * raw_pages * (P * DK), raw_values + head * raw_pages * (P * DV), row_table, state,
            partial + at * DV, lse + at, page_lse, split, readers, scaling, cap, width, H, V, G, P, DK, DV, DKP, DVP,
            ROWS, BN, KB > 0, CAP, SHARES, FAST, PRECISION, EARLY,
        )  # fmt: skip
    elif KB > 0:
        share = split - readers
        others = tl.maximum(splits - readers, 1)
        sealed_part(
            query, k_codes + head * sealed_pages * (P * UK), k_scales + head * sealed_pages * DK,
            v_codes + head * sealed_pages * (P * UV), v_scales + head * sealed_pages * (2 * P), row_table, state,
            partial + at * DV, lse + at, page_lse, sealed * share // others, sealed * (share + 1) // others, scaling,
            cap, width, H, V, G, P, DK, DV, COLS, KB, VB, UK, UV, UKP, UVP, CAP, SHARES, FAST, EARLY,
        )  # fmt: skip
