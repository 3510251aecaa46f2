"""Pieces of a prefill, merged, against one softmax in float64 over all keys and against `kernels.attention.attend`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels import prefill_backends
from hf_ctxopt.kernels.attention import Segment, attend
from hf_ctxopt.kernels.prefill import Piece, attend_piece, attend_pieces, merge

HEADS, KV_HEADS, DIM = 4, 2, 8


class Text:
    """Random states of `history` tokens and a chunk of `queries` behind them; the first `sinks` have own queries."""

    def __init__(self, history: int, queries: int, window: int | None = None, sinks: int = 0, value_dim: int = DIM):
        draw = torch.Generator().manual_seed(1000 * history + queries)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.history, self.queries, self.window, self.sinks = history, queries, window, sinks
        self.query, self.turned = normal(HEADS, queries, DIM), normal(HEADS, queries, DIM)
        self.keys, self.values = (
            normal(KV_HEADS, history + queries, DIM),
            normal(KV_HEADS, history + queries, value_dim),
        )
        self.sink_logits = normal(HEADS)

    def pieces(self, cuts: list[int]) -> list[Piece]:
        """The text cut at the sinks, before the chunk, and at `cuts`."""
        edges = sorted({0, self.sinks, self.history, self.history + self.queries, *cuts})
        found = []
        for start, stop in zip(edges, edges[1:], strict=False):
            sink = start < self.sinks
            query, window = (self.turned, None) if sink else (self.query, self.window)
            found.append(Piece(query, self.keys[:, start:stop], self.values[:, start:stop],
                               start - self.history, window))  # fmt: skip
        return found

    @property
    def mask(self) -> Tensor:
        """What each query sees, `(queries, tokens)`."""
        token = torch.arange(self.history, self.history + self.queries)[:, None]
        key = torch.arange(self.history + self.queries)[None]
        near = key > token - (self.window or 1 << 30)
        return (key <= token) & (near | (key < self.sinks))

    def expected(self, softcap: float | None = None, sink_logits: Tensor | None = None) -> Tensor:
        """One softmax over everything, in float64."""
        keys, values = (part.double().repeat_interleave(HEADS // KV_HEADS, 0) for part in (self.keys, self.values))
        scores = self.query.double() @ keys.transpose(1, 2) * 0.3
        scores[..., : self.sinks] = (self.turned.double() @ keys.transpose(1, 2) * 0.3)[..., : self.sinks]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self.mask, -math.inf)
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits.double()[:, None, None].expand(-1, self.queries, 1)], -1)
        return scores.softmax(-1)[..., : keys.shape[1]] @ values


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert one.isfinite().all()
    assert float((one.double() - other.double()).abs().amax()) < tolerance


SHAPES = [(0, 1), (0, 9), (0, 300), (13, 1), (13, 7), (300, 5), (7, 270), (64, 64)]
WINDOWS = [(None, 0), (1, 0), (5, 0), (5, 3), (40, 4), (40, 30), (1000, 4)]


def like_flash(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, left: int, right: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The reference with FlashAttention 2's reading of its windows: one limit alone makes the other one `tokens`."""
    tokens = keys.shape[1]
    left, right = (-1 if side >= tokens else side for side in (left, right))
    if max(left, right) >= 0:
        left, right = (tokens if side < 0 else side for side in (left, right))
    return prefill_backends.reference(query, keys, values, scaling, left, right, softcap)


@pytest.mark.parametrize("attend_like", [prefill_backends.reference, like_flash])
@pytest.mark.parametrize(("window", "sinks"), [*WINDOWS, (300, 33)])
@pytest.mark.parametrize(("history", "queries"), [*SHAPES, (500, 257)])
def test_pieces_of_any_size_give_the_whole(
    history: int,
    queries: int,
    window: int | None,
    sinks: int,
    attend_like: prefill_backends.Attend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = prefill_backends.Backend("under test", attend_like, "", lambda *_: None)
    monkeypatch.setattr(prefill_backends, "BACKENDS", (backend,))
    text = Text(history, queries, window, min(sinks, history + queries))
    whole = text.expected()
    for step in (1 << 20, 50, 3):
        cuts = list(range(0, history + queries, step)) if history + queries < 50 * step else []
        close(attend_pieces(text.pieces(cuts), 0.3), whole)


@pytest.mark.parametrize(("history", "queries"), SHAPES)
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "both"])
def test_they_equal_the_reference_that_asks_a_mask(history: int, queries: int, extras: str) -> None:
    """`kernels.attention.attend` is what the same call gives where this one does not serve."""
    text = Text(history, queries, window=40, sinks=min(4, history + queries), value_dim=6)
    softcap = 0.8 if extras in ("softcap", "both") else None
    logits = text.sink_logits if extras in ("sinks", "both") else None
    pieces = text.pieces([])
    segments = [Segment(p.keys, p.values, p.query) for p in pieces]
    asked = attend(text.query, segments, lambda first, last: text.mask[first:last], 0.3, softcap, logits)
    got = attend_pieces(pieces, 0.3, softcap, logits)
    close(got, asked)
    close(got, text.expected(softcap, logits))


def test_a_later_key_moves_nothing_before_it() -> None:
    text = Text(20, 30, window=12, sinks=3)
    before = attend_pieces(text.pieces([]), 0.3)
    for token in (20, 33, 49):
        text.keys[:, token] += 1
        text.values[:, token] -= 1
        after = attend_pieces(text.pieces([]), 0.3)
        assert torch.equal(after[:, : token - 20], before[:, : token - 20])
        assert not torch.allclose(after[:, token - 20], before[:, token - 20])
        before = after


def test_a_piece_is_asked_only_by_queries_that_see_it() -> None:
    text = Text(10, 20, window=6)
    history, own = text.pieces([])
    assert history.span() == (0, 5)  # the query at token 15 looks back to token 10
    assert own.span() == (0, 20)
    out, lse = attend_piece(history, 0.3)
    assert out.shape == (HEADS, 5, DIM)
    assert lse.shape == (HEADS, 5)
    assert lse.isfinite().all()
    late = Piece(text.query, text.keys[:, :3], text.values[:, :3], offset=17)
    assert late.span() == (17, 20)
    far = Piece(text.query, text.keys[:, :3], text.values[:, :3], offset=-9, window=6)
    assert far.span() == (0, 0)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    none, never = torch.zeros(2, 3, 4), torch.full((2, 3), -math.inf)
    for joint, total in (merge(out, lse, none, never), merge(none, never, out, lse)):
        close(joint, out, 1e-6)
        close(total, lse, 1e-6)
    joint, total = merge(none, never, none, never)
    assert torch.equal(joint, none)
    assert torch.equal(total, never)


def test_scores_far_apart_do_not_overflow() -> None:
    out, lse = merge(torch.ones(1, 1, 1), torch.tensor([[3e4]]), torch.zeros(1, 1, 1), torch.tensor([[-3e4]]))
    assert float(out) == 1.0
    assert float(lse) == 3e4


def test_no_pieces_are_an_error() -> None:
    text = Text(5, 2, window=2)
    with pytest.raises(ConfigError, match="pieces"):
        attend_pieces([], 0.3)
    with pytest.raises(ConfigError, match="pieces"):
        attend_pieces([Piece(text.query, text.keys[:, :2], text.values[:, :2], -5, 2)], 0.3)


def test_pieces_are_taken_one_at_a_time() -> None:
    text, alive = Text(60, 4), []

    def lazily() -> object:
        for piece in text.pieces(list(range(0, 60, 10))):
            alive.append(1)
            yield piece
            assert len(alive) == 1
            alive.pop()

    close(attend_pieces(lazily(), 0.3), text.expected())


def test_the_table_says_why() -> None:
    text = Text(5, 2)
    args = text.query, text.keys, text.values
    choice = prefill_backends.choose(*args, None)
    assert choice.name == "reference"
    assert choice.reason
    assert prefill_backends.BACKENDS[-1].refusal(*args, 3.0) is None
    for backend in prefill_backends.BACKENDS[:-1]:
        assert "CUDA" in str(backend.refusal(*args, None))
