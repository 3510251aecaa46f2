"""Attention of a chunk of queries over pieces of history and its own keys, without a dense mask.

Each piece gives its output and the log of its softmax sum, so pieces merge exactly: `softmax` over the joined keys is
the mean of the pieces' outputs weighted by `exp(lse)` (FlashAttention, Dao et al. 2022, arXiv 2205.14135, section
3.1; used so by Flash-Decoding and FlashInfer's `merge_state`). History may therefore be read, or decoded from
quantized pages, in pieces of bounded size whatever the length of the context.

What a query sees is told by two numbers, never by a tensor: where the piece's first key lies from the first query,
and how many tokens back a query looks. cuDNN is never called: it plans anew for every new length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from . import prefill_backends


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens, the queries that meet them, and which of them each query sees.

    Args:
        query: `(heads, queries, key_dim)`, rotated for these keys; `heads` a multiple of `kv_heads`.
        keys: `(kv_heads, tokens, key_dim)`.
        values: `(kv_heads, tokens, value_dim)`.
        offset: token of the first key minus token of the first query: 0 for the chunk's own keys, negative for
            history. Query `i` sees key `j` only if `offset + j <= i`.
        window: a query sees only its last `window` tokens, itself included; `None` for no limit.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    offset: int
    window: int | None = None

    def span(self) -> tuple[int, int]:
        """The queries `[first, last)` that see a key of the piece; each of them sees at least one."""
        queries, tokens = self.query.shape[1], self.keys.shape[1]
        first = max(0, self.offset)
        last = queries if self.window is None else min(queries, self.offset + tokens + self.window - 1)
        return (first, max(first, last)) if tokens else (first, first)


def attend_piece(piece: Piece, scaling: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the queries `piece.span()` over one piece.

    Args:
        piece: the keys and their queries; at least one query sees one of them.
        scaling: factor on the scores.
        softcap: Gemma 2's `softcap * tanh(score / softcap)`, applied before the mask.

    Returns:
        The output `(heads, last - first, value_dim)` in the query's dtype, and the log of the softmax sum
        `(heads, last - first)` in float32.
    """
    first, last = piece.span()
    # Keys behind the last query are seen by none. Queries behind the last key need no causal limit, and must not have
    # one: FlashAttention takes a right window as long as the keys for none at all, whatever the number of queries.
    # Those of them that a window limits it gives such a right window itself: there must be no more than keys.
    keys, values = (part[:, : last - piece.offset] for part in (piece.keys, piece.values))
    edge = min(max(first, piece.offset + keys.shape[1]), last)
    limited = last if piece.window is None else min(max(edge, piece.offset + piece.window), last)
    parts = [(start, stop) for start, stop in ((first, edge), (edge, limited), (limited, last)) if start < stop]
    found = [_attend(piece, keys, values, start, stop, scaling, softcap) for start, stop in parts]
    return found[0] if len(found) == 1 else (torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1))


def _attend(
    piece: Piece, keys: Tensor, values: Tensor, first: int, last: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The queries `[first, last)`: all up to the last key's token, or all behind it and then all, or none, limited."""
    query, tokens = piece.query[:, first:last], keys.shape[1]
    # Windows are aligned to the lower right corner: key j is seen if
    # i + tokens - queries - left <= j <= i + tokens - queries + right. -1 is no limit.
    right = 0 if first < piece.offset + tokens and last - first > 1 else -1
    left = -1 if piece.window is None else piece.offset + tokens - last + piece.window - 1
    choice = prefill_backends.choose(query, keys, values, softcap)
    return choice.attend(query, keys, values, scaling, left if left < tokens - 1 else -1, right, softcap)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each.

    Args:
        out: `(..., queries, value_dim)`.
        lse: `(..., queries)` float32; `-inf` where a query saw nothing.
        other: like `out`.
        other_lse: like `lse`.

    Returns:
        The joint output in float32 and its `lse`. Zeros and `-inf` where neither saw anything.
    """
    joint = torch.logaddexp(lse, other_lse)
    level = joint.masked_fill(joint == -torch.inf, 0)
    share, rest = (lse - level).exp_()[..., None], (other_lse - level).exp_()[..., None]
    return torch.addcmul(out.to(torch.float32) * share, other.to(torch.float32), rest), joint


def attend_pieces(
    pieces: Iterable[Piece], scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
) -> Tensor:
    """Attention over all pieces, which are taken one at a time: only one need exist at once.

    Args:
        pieces: at least one; every query sees a key of one of them.
        scaling: factor on the scores.
        softcap: see `attend_piece`.
        sink_logits: `(heads,)`, an extra logit per head that carries no value (GPT-OSS).

    Returns:
        `(heads, queries, value_dim)` in the queries' dtype.
    """
    total: tuple[Tensor, Tensor] | None = None
    dtype = torch.float32
    for piece in pieces:
        first, last = piece.span()
        dtype, queries = piece.query.dtype, piece.query.shape[1]
        if first == last:
            continue
        out, lse = attend_piece(piece, scaling, softcap)
        if total is None:
            rest = (first, queries - last)
            if rest != (0, 0):
                out, lse = functional.pad(out, (0, 0, *rest)), functional.pad(lse, rest, value=-torch.inf)
            total = out, lse
        else:
            part = slice(first, last)
            joint = merge(total[0][:, part], total[1][:, part], out, lse)
            # The running sum stays float32; a single piece never becomes it.
            total = total[0].to(torch.float32), total[1]
            total[0][:, part], total[1][:, part] = joint
    if total is None:
        raise ConfigError("pieces", "none with a key that a query sees", "at least one")
    out, lse = total
    if sink_logits is not None:
        out = out * torch.sigmoid(lse - sink_logits.to(torch.float32)[:, None])[..., None]
    return out.to(dtype)
