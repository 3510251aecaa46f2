"""`ctx_sink` under eviction is StreamingLLM: in-cache positions, whatever the chunks, the padding and the rotary kind.

The fused route is exact for chunks of any size. On the dense route stock masks know no window, so a chunk of many
tokens sees a superset: it is held to the reference for one-token steps after a prefill that fits.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import hf_ctxopt
from tests.families import VOCAB, build
from tests.feeding import feed, pad_left, routed
from tests.streaming_reference import contiguous_logits, streaming_logits

TOKENS, SINKS, WINDOW = 200, 4, 48
SIZE = SINKS + WINDOW
CHUNKS = [1, 7, 31, 32, 33, 64]
SHORT = 110
"""Tokens of a text for checks that repeat over families: more than twice what is kept."""
TEXT = torch.randint(2, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))
SCALED_LLAMAS = ["llama3_rope", "yarn_rope", "linear_rope", "dynamic_rope"]
ONE_LAYER = ["phi", "phi3", "gpt_neox", "cohere", "glm", "qwen3", "olmo2", "longrope"]
"""Rotary kinds of other architectures: partial, interleaved, normed, scaled; checked on one layer."""


@functools.cache
def _model(family: str, layers: int = 2) -> nn.Module:
    return build(family) if layers == 2 else build(family, num_hidden_layers=layers)


@functools.cache
def _expected(family: str, layers: int = 2) -> torch.Tensor:
    """Reference logits `(seq, vocab)` of `TEXT`, of its first `SHORT` tokens where the family is not Llama."""
    reference = streaming_logits if layers == 2 else contiguous_logits
    return reference(_model(family, layers), TEXT if family == "llama" else TEXT[:SHORT], SINKS, WINDOW)


@functools.cache
def _shifted(sinks: int, window: int, n_discard: int) -> torch.Tensor:
    """Reference logits `(seq, vocab)` of the first 90 tokens under llama.cpp's context shift."""
    return streaming_logits(_model("llama"), TEXT[:90], sinks, window, n_discard)


def _stream(
    model: nn.Module, route: str, rows: list[torch.Tensor], chunk: int, prefill: int = 0, **options: Any
) -> list[torch.Tensor]:
    """Logits `(seq, vocab)` of each text, fed as one left-padded batch through one `ctx_sink`."""
    options = {"sinks": SINKS, "window": WINDOW, "page_size": 8, **options}
    ids, mask = pad_left(rows)
    padded = not bool(mask.all())
    with routed(route, model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", attention_mask=mask if padded else None, **options)
        logits = feed(model, ids, cache, chunk, prefill, mask if padded else None)
        cache.check_integrity()
    assert cache.get_seq_length() == ids.shape[1]
    stats = cache.stats()
    assert stats["tokens_evicted"] > 0
    assert stats["steps"][route] > 0
    return [logits[i, -len(row) :] for i, row in enumerate(rows)]


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_fused_route_is_streaming_llm_for_every_chunk(chunk: int, page_size: int) -> None:
    [got] = _stream(_model("llama"), "fused", [TEXT], chunk, page_size=page_size)
    _close(got, _expected("llama"))


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("prefill", [0, 20, SIZE])
def test_dense_route_is_streaming_llm_for_single_tokens(prefill: int, page_size: int) -> None:
    [got] = _stream(_model("llama"), "dense", [TEXT], chunk=1, prefill=prefill, page_size=page_size)
    _close(got, _expected("llama"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_dense_route_under_both_stock_implementations(attn: str) -> None:
    [got] = _stream(build("llama", attn=attn), "dense", [TEXT[:90]], chunk=1, prefill=SIZE)
    _close(got, _expected("llama")[:90])


@pytest.mark.parametrize(("sinks", "window"), [(0, 16), (1, 16), (4, 13), (5, 30), (9, 7)])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_sinks_and_windows_that_are_no_multiple_of_a_page(route: str, sinks: int, window: int) -> None:
    text = TEXT[:90]
    chunk = 11 if route == "fused" else 1
    [got] = _stream(_model("llama"), route, [text], chunk, sinks=sinks, window=window)
    _close(got, streaming_logits(_model("llama"), text, sinks, window))


@pytest.mark.parametrize(
    ("sinks", "window", "n_discard"), [(4, 48, 0), (4, 48, 8), (3, 20, 1), (0, 33, 50), (4, 12, 5)]
)
@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 13), ("fused", 64)])
def test_context_shift_is_that_of_llama_cpp(route: str, chunk: int, sinks: int, window: int, n_discard: int) -> None:
    [got] = _stream(_model("llama"), route, [TEXT[:90]], chunk, sinks=sinks, window=window, n_discard=n_discard)
    _close(got, _shifted(sinks, window, n_discard))


@pytest.mark.parametrize("family", SCALED_LLAMAS)
@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 33)])
def test_scaled_rotary_kinds_of_llama(family: str, route: str, chunk: int) -> None:
    [got] = _stream(_model(family), route, [TEXT[:SHORT]], chunk)
    _close(got, _expected(family))


@pytest.mark.parametrize("family", ONE_LAYER)
@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 33)])
def test_rotary_kinds_of_other_families(family: str, route: str, chunk: int) -> None:
    [got] = _stream(_model(family, 1), route, [TEXT[:SHORT]], chunk)
    _close(got, _expected(family, 1))


@pytest.mark.parametrize(
    "family", ["llama", "llama3_rope", "yarn_rope", "phi", "cohere", "glm", "gemma3", "mimo_v2_flash"]
)
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_a_padded_row_equals_the_row_alone(family: str, route: str) -> None:
    """Pads leave first, sinks are the first real tokens, and rows evict from different steps on."""
    rows = [TEXT[:90], TEXT[20:93], TEXT[40:128]]
    together = _stream(_model(family), route, rows, chunk=1, prefill=SIZE)
    for row, got in zip(rows, together, strict=True):
        [alone] = _stream(_model(family), route, [row], chunk=1, prefill=SIZE - (90 - len(row)))
        _close(got, alone)


@pytest.mark.parametrize("chunk", [5, 16, 40])
def test_padded_rows_in_chunks_are_streaming_llm(chunk: int) -> None:
    rows = [TEXT, TEXT[:163], TEXT[30:]]
    for row, got in zip(rows, _stream(_model("llama"), "fused", rows, chunk), strict=True):
        _close(got, streaming_logits(_model("llama"), row, SINKS, WINDOW))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "gemma2", "mimo_v2_flash"])
def test_hybrid_models_agree_with_themselves(family: str) -> None:
    """Sliding layers drop their own pages, full layers follow the sinks: one answer for all chunks and routes."""
    model = _model(family)
    [expected] = _stream(model, "dense", [TEXT[:SHORT]], chunk=1)
    for chunk in (1, 7, 33):
        [got] = _stream(model, "fused", [TEXT[:SHORT]], chunk)
        _close(got, expected)


@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 33)])
def test_a_model_that_only_slides_is_untouched(route: str, chunk: int) -> None:
    """Every layer of this Mistral forgets sooner than the window: `ctx_sink` drops what the model drops, no more."""
    model = _model("mistral")
    with torch.no_grad():
        plain = model(TEXT[None, :SHORT], use_cache=False).logits[0]
    [got] = _stream(model, route, [TEXT[:SHORT]], chunk)
    _close(got, plain)
