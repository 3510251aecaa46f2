# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""Merging the splits of the paged decode attention, and the shares of each page."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _peak_and_total(lse, sink_logits, head, index, valid, V: tl.constexpr, G: tl.constexpr, SINK: tl.constexpr):
    """Largest log2-sum-exp of a head's splits and variants (finite), and their sum relative to it."""
    values = tl.load(lse + index * G, mask=valid, other=float("-inf"))
    peak = tl.maximum(tl.max(values, 0), -1e30)
    if SINK:
        sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
        return peak, tl.sum(tl.exp2(values - peak), 0) + tl.exp2(sink - peak)
    else:
        return peak, tl.sum(tl.exp2(values - peak), 0)


@triton.jit
def combine_kernel(
    partial, lse, sink_logits, out, HEADS: tl.constexpr, V: tl.constexpr, G: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, SINK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * heads, cdiv(DV, BD))`; variants of one head are merged like splits.

    With `EARLY` the launch may begin while the splits still run (programmatic dependent launch) and waits for them.
    """
    at, block = tl.program_id(0), tl.program_id(1)
    head = at % HEADS
    if EARLY:
        tl.extra.cuda.gdc_wait()
    # partial is (batch, kv_heads, SPLITS * V, G, DV): a head's parts lie G apart
    base = (at // G).to(tl.int64) * (SPLITS * V * G) + at % G
    index = tl.arange(0, PARTS)
    peak, total = _peak_and_total(lse + base, sink_logits, head, index, index < SPLITS * V, V, G, SINK)
    d = block * BD + tl.arange(0, BD)
    acc = tl.zeros((CHUNK, BD), tl.float32)
    for first in tl.static_range(0, PARTS, CHUNK):
        part = first + tl.arange(0, CHUNK)
        value = tl.load(lse + base + part * G, mask=part < SPLITS * V, other=float("-inf"))
        used = (part < SPLITS * V)[:, None] & (d < DV)[None, :]  # not the sums: their load need not come first
        states = tl.load(partial + (base + part * G)[:, None] * DV + d[None, :], mask=used, other=0.0)
        acc += states * tl.exp2(value - peak)[:, None]
    result = tl.sum(acc, 0) / tl.maximum(total, 1e-38)
    tl.store(out + at.to(tl.int64) * DV + d, result.to(out.dtype.element_ty), mask=d < DV)


@triton.jit(do_not_specialize=["width", "state_width"])
def shares_kernel(
    page_lse, lse, sink_logits, rows, shares, width, state_width, HEADS: tl.constexpr, V: tl.constexpr,
    G: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BE: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * heads, cdiv(width, BE))`; `page_lse` is `(batch, kv_heads, V, G, width)`."""
    at, block = tl.program_id(0), tl.program_id(1)
    head = at % HEADS
    base = (at // G).to(tl.int64) * (SPLITS * V * G) + at % G
    index = tl.arange(0, PARTS)
    peak, total = _peak_and_total(lse + base, sink_logits, head, index, index < SPLITS * V, V, G, SINK)
    entry = block * BE + tl.arange(0, BE)
    live = entry < tl.load(rows + (at // HEADS) * state_width)
    acc = tl.zeros((BE,), tl.float32)
    for variant in tl.static_range(V):
        row = (at // G).to(tl.int64) * (V * G) + variant * G + at % G
        value = tl.load(page_lse + row * width + entry, mask=live, other=float("-inf"))
        acc += tl.exp2(value - peak)
    tl.store(shares + at.to(tl.int64) * width + entry, acc / tl.maximum(total, 1e-38), mask=entry < width)
