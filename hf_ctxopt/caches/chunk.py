"""A chunk of queries against a row's history and its own keys, piece by piece: the fused route's prefill on a GPU.

Scratch is bounded by the chunk and by `PIECE_BYTES`, whatever the length of the context: quantized history is decoded
one piece at a time, and no mask is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.prefill import Piece, attend_pieces
from ..pages.plan import RowStep
from ..pages.rows import Stretch

if TYPE_CHECKING:
    from .view import Mask, StepView

PIECE_BYTES = 16 << 20  # of quantized history that is decoded at once: 4,096 tokens of 8 heads of 128 in bf16
DEVICES = {"cuda"}  # elsewhere torch's own fused attention over views is as good


def serves(view: StepView, query: Tensor, mask: Mask | None) -> bool:
    """Whether what the queries `(heads, queries, key_dim)` see is a plain window over the row's tokens.

    Masks of other shapes and windows that move in jumps (`n_discard`) are asked about position by position instead.
    """
    if query.device.type not in DEVICES or query.shape[1] == 1 or not view.policy.slides:
        return False
    learning = torch.is_grad_enabled() and (query.requires_grad or view.keys.requires_grad)
    return not learning and view.plain(mask)


def attend_chunk(
    view: StepView,
    index: int,
    row: RowStep,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of one row's chunk.

    Args:
        view: the layer's step.
        index: the row.
        row: its part in the step.
        query: `(heads, queries, key_dim)`.
        scaling: factor on the scores.
        softcap: see `kernels.prefill.attend_piece`.
        sink_logits: `(heads,)` or `None`.

    Returns:
        `(heads, queries, value_dim)`, where there is history in the basis that pages are stored in.
    """
    return attend_pieces(_pieces(view, index, row, query), scaling, softcap, sink_logits)


def _pieces(view: StepView, index: int, row: RowStep, query: Tensor) -> Iterator[Piece]:
    """All of the row's tokens; where there is history, everything is in the basis that pages are stored in."""
    own = view.storage.turned_query(query) if row.start else query
    turned: dict[tuple[int, int], Tensor] = {}
    sinks = view.policy.sinks
    for stretch, keys, values in _stretches(view, index, row):
        for token, length, base, leap in view.cut(row, stretch):
            if (base, leap) not in turned:
                moved = view.turned(row, query, base, leap)
                turned[base, leap] = own if moved is None else moved
            # The sinks are seen whatever the window.
            inside = length if view.policy.most_held is None else min(max(0, sinks - token), length)
            for start, stop, window in ((0, inside, None), (inside, length, view.policy.most_held)):
                part = slice(token + start - stretch.token, token + stop - stretch.token)
                if start < stop:
                    offset = token + start - row.start
                    yield Piece(turned[base, leap], keys[:, part], values[:, part], offset, window)


def piece_tokens(view: StepView) -> int:
    """Tokens of quantized history that are decoded at once: whole pages, 256 tokens at least."""
    token = sum(states.shape[1] * states.shape[-1] * states.element_size() for states in (view.keys, view.values))
    size = view.storage.page_size
    return -(-max(256, PIECE_BYTES // token) // size) * size


def _stretches(view: StepView, index: int, row: RowStep) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
    """The row's history, then the chunk's own states as they came."""
    if view.old is not None:
        yield from view.old[index]
    else:
        for held in row.after:
            if held.token < row.start:
                past = Stretch(held.slot, held.token, min(held.length, row.start - held.token))
                for stretch, states in view.not_encoded(index, row, past):
                    yield from _pages(view, stretch) if states is None else [(stretch, *states)]
    first = view.plan.queries - (row.stop - row.start)
    new = Stretch(-1, row.start, row.stop - row.start)
    keys, values = view.stored if row.start and view.stored is not None else (view.keys, view.values)
    yield new, keys[index, :, first:], values[index, :, first:]


def _pages(view: StepView, stretch: Stretch) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
    """A stretch of pages; sealed ones are decoded piece by piece."""
    most = piece_tokens(view) if stretch.sealed(view.storage.page_size) else stretch.length
    for start in range(0, stretch.length, most):
        part = Stretch(stretch.slot + start, stretch.token + start, min(most, stretch.length - start))
        yield part, *view.storage.read(part)
