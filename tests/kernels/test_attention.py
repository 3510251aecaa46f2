"""`attend` against a plain softmax in float64, over segments of every shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ctxopt.kernels import attention
from hf_ctxopt.kernels.attention import Segment, Visible, attend
from hf_ctxopt.kernels.rotate import RotaryFacts, rotate

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INV_FREQ = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
ROTARY = RotaryFacts(lambda: INV_FREQ)


@dataclass
class Problem:
    """Random queries and segments.

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        queries: number of queries.
        lengths: tokens of each segment.
        value_dim: head size of the values; keys have 8.
        turned: segments with queries of their own, rotated.
    """

    heads: int = 4
    kv_heads: int = 2
    queries: int = 3
    lengths: tuple[int, ...] = (5, 1, 7)
    value_dim: int = 8
    turned: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(sum(self.lengths) + self.queries)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(self.dtype)

        self.query = normal(self.heads, self.queries, 8)
        self.mask = torch.rand(self.queries, sum(self.lengths), generator=draw) < 0.6
        self.mask[:, 0] = True
        self.sink_logits = torch.randn(self.heads, generator=draw)
        self.segments = []
        for index, length in enumerate(self.lengths):
            turned = rotate(self.query, -50 * (index + 1), ROTARY) if index in self.turned else None
            keys, values = normal(self.kv_heads, length, 8), normal(self.kv_heads, length, self.value_dim)
            self.segments.append(Segment(keys, values, turned))

    def visible(self, mask: Tensor | None) -> Visible:
        """The callback of `attend` for a whole mask."""
        return lambda start, stop: None if mask is None else mask[start:stop]

    def expected(
        self, mask: Tensor | None, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Head by head and query by query, in float64."""
        groups = self.heads // self.kv_heads
        values = torch.cat([part.values for part in self.segments], dim=1).double()
        out = torch.zeros(self.heads, self.queries, self.value_dim, dtype=torch.float64)
        for head in range(self.heads):
            for query in range(self.queries):
                scores = torch.cat([
                    part.keys[head // groups].double()
                    @ (self.query if part.query is None else part.query)[head, query].double()
                    for part in self.segments
                ]) * scaling  # fmt: skip
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[query]
                weights = torch.where(seen, scores.exp(), 0.0)
                total = weights.sum() + (0 if sink_logits is None else sink_logits[head].double().exp())
                if seen.any():
                    out[head, query] = (weights / total) @ values[head // groups]
        return out

    def check(self, mask: Tensor | None = None, scaling: float = 8**-0.5, **special: Any) -> Tensor:
        """Runs `attend` and compares."""
        out = attend(self.query, self.segments, self.visible(mask), scaling, **special)
        assert out.dtype == self.dtype
        assert out.shape == (self.heads, self.queries, self.value_dim)
        expected = self.expected(mask, scaling, **special)
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[self.dtype], rtol=TOLERANCE[self.dtype])
        return out


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LENGTHS = pytest.mark.parametrize("lengths", [(9,), (1,), (4, 9), (1, 1, 1), (5, 1, 7, 30)], ids=str)
QUERIES = pytest.mark.parametrize("queries", [1, 3, 17])


@DTYPES
@LENGTHS
@QUERIES
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
def test_all_head_layouts(
    heads: int, kv_heads: int, queries: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    problem = Problem(heads, kv_heads, queries, lengths, dtype=dtype)
    problem.check()
    problem.check(problem.mask)


@DTYPES
@LENGTHS
@QUERIES
@pytest.mark.parametrize("value_dim", [3, 16])
def test_values_of_another_head_size(
    value_dim: int, queries: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    problem = Problem(queries=queries, lengths=lengths, value_dim=value_dim, dtype=dtype)
    problem.check()
    problem.check(problem.mask)


@DTYPES
@LENGTHS
@QUERIES
@pytest.mark.parametrize("special", ["softcap", "sink_logits", "both"])
def test_softcap_and_sink_logits(special: str, queries: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem(queries=queries, lengths=lengths, dtype=dtype)
    options: dict[str, Any] = {} if special == "sink_logits" else {"softcap": 0.7}
    if special != "softcap":
        options["sink_logits"] = problem.sink_logits
    plain = problem.check(problem.mask)
    changed = problem.check(problem.mask, **options)
    if queries == 17 and (special != "softcap" or sum(lengths) > 1):  # one key's weight is 1 whatever its score
        assert (plain - changed).abs().max() > 0.05


@DTYPES
@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}, {"sink_logits": torch.tensor([0.5, -1.0, 3.0, 0.0])}])
@LENGTHS
@QUERIES
def test_a_query_that_sees_nothing_gives_zeros_and_the_others_stay_right(
    queries: int, lengths: tuple[int, ...], special: dict[str, Any], dtype: torch.dtype
) -> None:
    problem = Problem(queries=queries, lengths=lengths, dtype=dtype)
    mask = problem.mask.clone()
    mask[::2] = False
    out = problem.check(mask, **special)
    assert not out[:, ::2].any()
    assert queries == 1 or out[:, 1].any()
    problem.check(torch.zeros_like(mask), **special)


@pytest.mark.parametrize("lengths", [(5, 1, 7), (13,)])
def test_gradients_of_a_query_that_sees_nothing_are_zeros(lengths: tuple[int, ...]) -> None:
    """Its sums were divided by the least float: a gradient above 3.4 overflowed, and all values' were NaN."""
    problem = Problem(lengths=lengths)
    problem.mask[1] = False
    states = [problem.query, *(state for part in problem.segments for state in (part.keys, part.values))]
    for state in states:
        state.requires_grad_()
    out = attend(problem.query, problem.segments, problem.visible(problem.mask), 0.3)
    out.backward(torch.full_like(out, 100.0))
    assert all(bool(state.grad.isfinite().all()) for state in states if state.grad is not None)
    assert not problem.query.grad[:, 1].any()


@DTYPES
@pytest.mark.parametrize("turned", [(0,), (0, 2), (0, 1, 2)])
@QUERIES
def test_segments_may_bring_queries_of_their_own(queries: int, turned: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem(queries=queries, turned=turned, dtype=dtype)
    out = problem.check(problem.mask)
    plain = Problem(queries=queries, dtype=dtype).check(problem.mask)
    assert (out - plain).abs().max() > 0.02


def test_a_single_segment_with_its_own_query() -> None:
    problem = Problem(lengths=(6,), turned=(0,))
    problem.check(problem.mask)


@pytest.mark.parametrize("block", [1, 2, 5, 16, 17, 256])
@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}])
@pytest.mark.parametrize("lengths", [(9,), (4, 9)])
def test_blocks_of_queries_join_without_a_seam(
    block: int, special: dict[str, Any], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    problem = Problem(queries=17, lengths=lengths, turned=(1,) if len(lengths) > 1 else ())
    asked: list[tuple[int, int]] = []

    def visible(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return problem.mask[start:stop]

    out = attend(problem.query, problem.segments, visible, 1.0, **special)
    expected = problem.expected(problem.mask, 1.0, **special)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    assert asked == [(start, min(start + block, 17)) for start in range(0, 17, block)]


@DTYPES
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 2, 9])
def test_causal_means_query_i_sees_keys_up_to_i(queries: int, kv_heads: int, dtype: torch.dtype) -> None:
    problem = Problem(kv_heads=kv_heads, queries=queries, lengths=(queries,), dtype=dtype)
    mask = torch.ones(queries, queries, dtype=torch.bool).tril()
    out = attend(problem.query, problem.segments, problem.visible(mask), 0.3, causal=True)
    torch.testing.assert_close(out.double(), problem.expected(mask, 0.3), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_how_a_text_is_cut_into_segments_does_not_matter() -> None:
    whole = Problem(lengths=(13,))
    keys, values = whole.segments[0].keys, whole.segments[0].values
    expected = whole.check(whole.mask)
    for cuts in ([0, 13], [0, 1, 13], [0, 4, 5, 12, 13]):
        parts = [Segment(keys[:, a:b], values[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        out = attend(whole.query, parts, whole.visible(whole.mask), 8**-0.5)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(6,), (2, 4)])
def test_scores_too_large_for_exp_do_not_overflow(lengths: tuple[int, ...]) -> None:
    problem = Problem(lengths=lengths)
    out = attend(problem.query, problem.segments, problem.visible(problem.mask), 1e4)
    scores = torch.cat([part.keys for part in problem.segments], dim=1).repeat_interleave(2, 0)
    scores = (problem.query @ scores.transpose(1, 2)).masked_fill(~problem.mask, -torch.inf)
    values = torch.cat([part.values for part in problem.segments], dim=1).repeat_interleave(2, 0)
    best = values.gather(1, scores.argmax(-1)[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(out, best, atol=1e-5, rtol=1e-5)


def test_strided_views_are_read_as_they_are() -> None:
    """Queries come transposed out of the model and keys as slices of a larger storage."""
    problem = Problem(queries=1, lengths=(5,))
    expected = problem.check(problem.mask)
    query = problem.query.transpose(0, 1).contiguous().transpose(0, 1)
    store_keys, store_values = torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    store_keys[:, 7:12], store_values[:, 7:12] = problem.segments[0].keys, problem.segments[0].values
    part = Segment(store_keys[:, 7:12], store_values[:, 7:12])
    out = attend(query, [part], problem.visible(problem.mask), 8**-0.5)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
