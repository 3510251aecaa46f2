"""Attention of one sequence over stretches of keys and values: the torch reference.

Keys and values are read where they lie, one view per stretch; they are joined into one tensor only where that takes
less memory than scores would. Scores and sums are float32. A GPU kernel that replaces this takes the same arguments
and must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .native import attend as native
from .scratch import SCRATCH, scratch
from .sdpa import sdpa
from .sealed import SealedSegment

QUERY_BLOCK = 256  # bounds the float32 scores of a long prefill to (heads, 256, keys)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one sequence.

    Args:
        keys: `(kv_heads, tokens, key_dim)`.
        values: `(kv_heads, tokens, value_dim)`.
        query: the queries this segment's keys are compared with, `(heads, queries, key_dim)`, where they must be
            rotated for it; `None` for the step's own queries.
    """

    keys: Tensor
    values: Tensor
    query: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the segment."""
        return self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.keys.shape[0]

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.values.shape[-1]

    def copy_to(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, `(kv_heads, tokens, dim)`, to float32 tensors."""
        keys.copy_(self.keys)
        values.copy_(self.values)

    def scores(self, query: Tensor) -> Tensor:
        """Products of float32 queries `(kv_heads, rows, key_dim)` with the keys, `(kv_heads, rows, tokens)`."""
        return query @ self.keys.to(torch.float32).transpose(1, 2)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of the values by float32 weights `(kv_heads, rows, tokens)`, `(kv_heads, rows, value_dim)`."""
        return weights @ self.values.to(torch.float32)


# visible(first query, one past the last) -> bool (queries, keys), or None if every query sees every key
Visible = Callable[[int, int], Tensor | None]


def attend(
    query: Tensor,
    segments: Sequence[Segment | SealedSegment],
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention over all segments.

    Args:
        query: `(heads, queries, key_dim)`, `heads` a multiple of `kv_heads`.
        segments: at least one; their tokens side by side are the keys.
        visible: which keys a block of queries sees, over the segments' tokens side by side.
        scaling: factor on the scores.
        softcap: Gemma 2's `softcap * tanh(score / softcap)`, applied before the mask.
        sink_logits: `(heads,)`, an extra logit per head that takes part in the softmax and carries no value (GPT-OSS).
        causal: the keys are the queries' own tokens and query `i` sees keys `0..i`; `visible` is not asked.

    Returns:
        `(heads, queries, value_dim)` in the query's dtype. A query that sees nothing gives zeros.
    """
    first = segments[0]
    if softcap is None and sink_logits is None and len(segments) == 1 and first.query is None:
        if isinstance(first, Segment):
            return _fused(query, first, visible, scaling, causal)
    if native.serves(query, segments):
        return native.attend(query, segments, visible(0, 1), scaling, softcap, sink_logits)
    plain = softcap is None and sink_logits is None and all(part.query is None for part in segments)
    if plain and query.shape[1] == 1 and any(isinstance(part, SealedSegment) for part in segments):
        whole = _unpacked(query, segments)
        if whole is not None:
            return _fused(query.to(torch.float32), whole, visible, scaling, causal=False).to(query.dtype)
    if plain and query.shape[1] > 1 and (joined := _joined(query, segments)) is not None:
        return _fused(query, joined, visible, scaling, causal=False)
    blocks = []
    for start in range(0, query.shape[1], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, query.shape[1])
        scores = _scores(query, segments, start, stop, scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        blocks.append(_mix(scores, visible(start, stop), segments, sink_logits).to(query.dtype))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _unpacked(query: Tensor, segments: Sequence[Segment | SealedSegment]) -> Segment | None:
    """All segments as one, in float32 scratch memory; `None` where they do not fit it.

    Where they fit, three passes over them and torch's fused attention are fewer operations, and so faster on a CPU,
    than folding scales into queries and probabilities.
    """
    heads, tokens = segments[0].kv_heads, sum(part.tokens for part in segments)
    dims = query.shape[-1], segments[0].value_dim
    if heads * tokens * max(dims) > SCRATCH:
        return None
    keys, values = (scratch(name, query.device, heads, tokens, dim) for name, dim in zip("kv", dims, strict=True))
    place = 0
    for part in segments:
        at = slice(place, place + part.tokens)
        part.copy_to(keys[:, at], values[:, at])
        place += part.tokens
    return Segment(keys, values)


def _joined(query: Tensor, segments: Sequence[Segment | SealedSegment]) -> Segment | None:
    """All segments of a chunk as one; `None` where scores of a block of queries take less memory."""
    parts = [
        part for part in segments if isinstance(part, Segment) and part.keys.dtype == part.values.dtype == query.dtype
    ]
    scores = query.shape[0] * min(query.shape[1], QUERY_BLOCK) * torch.float32.itemsize
    states = parts[0].kv_heads * (query.shape[-1] + parts[0].value_dim) * query.dtype.itemsize if parts else 0
    if len(parts) < len(segments) or states > scores:
        return None
    return Segment(torch.cat([part.keys for part in parts], 1), torch.cat([part.values for part in parts], 1))


def _fused(query: Tensor, segment: Segment, visible: Visible, scaling: float, causal: bool) -> Tensor:
    """One segment and nothing special: torch's own fused attention on the views, no scores kept."""
    heads, queries, _ = query.shape
    groups = heads // segment.keys.shape[0]
    keys, values = segment.keys[None], segment.values[None]
    if queries == 1:
        mask = visible(0, 1)
        return _blank(attend_whole(query[None], keys, values, scaling, mask)[0], mask)
    if causal:
        return sdpa(query[None], keys, values, is_causal=True, scale=scaling, enable_gqa=groups > 1)[0]
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):
        part = query[None, :, start : start + QUERY_BLOCK]
        mask = visible(start, start + part.shape[2])
        out = sdpa(part, keys, values, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
        blocks.append(_blank(out[0], mask))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def attend_whole(query: Tensor, keys: Tensor, values: Tensor, scaling: float, seen: Tensor | None = None) -> Tensor:
    """One query over keys that lie in one piece.

    Args:
        query: `(1, heads, 1, key_dim)`.
        keys: `(1, kv_heads, tokens, key_dim)`.
        values: `(1, kv_heads, tokens, value_dim)`.
        scaling: factor on the scores.
        seen: which keys it sees, bool `(1, tokens)`; `None` for all.

    Returns:
        `(1, heads, 1, value_dim)`.
    """
    # Query heads that share keys become queries of one head: no repeated keys, on any backend, and in bfloat16 a
    # fraction of the time that torch's CPU kernel takes with `enable_gqa`.
    heads, kv_heads = query.shape[1], keys.shape[1]
    packed = query.view(1, kv_heads, heads // kv_heads, -1)
    mask = None if seen is None else seen.expand(heads // kv_heads, -1)
    out = sdpa(packed, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(1, heads, 1, -1)


def _blank(out: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros (not NaN) where a query sees nothing."""
    return out if mask is None else out.masked_fill(~mask.any(-1)[None, :, None], 0)


def _scores(
    query: Tensor, segments: Sequence[Segment | SealedSegment], start: int, stop: int, scaling: float
) -> Tensor:
    """Float32 scores of queries `[start, stop)` over all segments, `(heads, queries, keys)`."""
    keys = sum(part.tokens for part in segments)
    scores = torch.empty(query.shape[0], stop - start, keys, dtype=torch.float32, device=query.device)
    place = 0
    for part in segments:
        source = (query if part.query is None else part.query)[:, start:stop].to(torch.float32) * scaling
        product = part.scores(source.reshape(part.kv_heads, -1, source.shape[-1]))
        scores[..., place : place + part.tokens] = product.reshape(*source.shape[:2], -1)
        place += part.tokens
    return scores


def _mix(
    scores: Tensor, mask: Tensor | None, segments: Sequence[Segment | SealedSegment], sink_logits: Tensor | None
) -> Tensor:
    """Softmax over the keys and the weighted sum of the values, `(heads, queries, value_dim)` in float32.

    `scores` is overwritten unless autograd needs it: at long prefills it is the largest tensor there is.
    """
    recycle = not scores.requires_grad
    if mask is not None:
        hidden = ~mask
        scores = scores.masked_fill_(hidden, -torch.inf) if recycle else scores.masked_fill(hidden, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    if sink_logits is not None:
        peak = torch.maximum(peak, sink_logits.to(torch.float32)[:, None, None])
    peak = peak.clamp_min(torch.finfo(torch.float32).min)  # a query that sees nothing has a peak of -inf
    weights = scores.sub_(peak).exp_() if recycle else (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink_logits.to(torch.float32)[:, None, None] - peak).exp()
    heads, queries, _ = scores.shape
    result = weights.new_zeros(heads, queries, segments[0].value_dim)
    place = 0
    for part in segments:
        share = weights[..., place : place + part.tokens]
        result += part.mix(share.reshape(part.kv_heads, -1, part.tokens)).view(heads, queries, -1)
        place += part.tokens
    return result / total.clamp_min(1.0)  # the peak's own share is 1; a query that sees nothing has 0
