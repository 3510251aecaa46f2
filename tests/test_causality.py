"""No logit may depend on a later token: for every cache, route and chunking.

Perplexity cannot see such a leak (it falls). Here a batch holds one text many times, each row with one other token
changed; every logit before the change must be what it is in the unchanged row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import hf_ctxopt
from tests.families import FAMILIES, VOCAB, model_for
from tests.feeding import feed, routed

TOKENS = 44
CHANGED = [1, 4, 7, 8, 16, 25, 32, 33, 42, 43]
"""Places inside and at the edges of pages, chunks, sinks and windows."""
CHUNKS = [7, 16, TOKENS]
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "paged": ("ctx_paged", {"page_size": 4}),
    "sink": ("ctx_sink", {"sinks": 4, "window": 20, "page_size": 8}),
    "paged_int4": ("ctx_paged", {"page_size": 4, "kv_bits": 4}),
    "sink_int2": ("ctx_sink", {"sinks": 4, "window": 20, "page_size": 8, "kv_bits": 2, "seal_sinks": True}),
    "sink_discard": ("ctx_sink", {"sinks": 3, "window": 20, "n_discard": 8, "page_size": 4}),
}
EVERYWHERE = ["llama", "mistral", "gemma2", "gemma3", "phi", "gpt2", "cohere", "gpt_oss", "glm", "mimo_v2_flash"]


def _rows(pads: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The text, then the text with one token changed per row: ids and mask `(1 + changes, pads + seq)`."""
    text = torch.randint(2, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(9))
    rows = text.repeat(1 + len(CHANGED), 1)
    for row, place in enumerate(CHANGED, start=1):
        rows[row, place] = 2 + (rows[row, place] + 61) % (VOCAB - 2)
    if not pads:
        return rows, None
    ids = torch.cat([rows.new_zeros(len(rows), pads), rows], dim=1)
    return ids, torch.cat([rows.new_zeros(len(rows), pads), torch.ones_like(rows)], dim=1)


def _leak(logits: torch.Tensor, pads: int = 0) -> float:
    """Largest change of a logit before the changed token, over all rows."""
    logits = logits[:, pads:]
    return max(
        float((logits[row, :place] - logits[0, :place]).abs().amax()) for row, place in enumerate(CHANGED, start=1)
    )


def _effect(logits: torch.Tensor, pads: int = 0) -> float:
    """Smallest change of the logits at the changed token, over all rows: the change was seen at all."""
    logits = logits[:, pads:]
    return min(
        float((logits[row, place] - logits[0, place]).abs().amax()) for row, place in enumerate(CHANGED, start=1)
    )


def _check(family: str, route: str, cache_name: str, options: dict[str, Any], chunk: int, pads: int = 0) -> None:
    model = model_for(family, "causality")
    ids, mask = _rows(pads)
    with routed(route, model, cache_name, **options):
        cache = hf_ctxopt.make_cache(model, cache_name, attention_mask=mask, **options)
        logits = feed(model, ids, cache, chunk, mask=mask)
    assert _leak(logits, pads) < 1e-5
    assert _effect(logits, pads) > 1e-2


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("kind", ["paged", "sink"])
@pytest.mark.parametrize("family", EVERYWHERE)
def test_no_logit_depends_on_a_later_token(family: str, kind: str, route: str, chunk: int) -> None:
    name, options = CACHES[kind]
    if name == "ctx_sink" and FAMILIES[family].positions != "rope":
        options = {"window": 256}
    _check(family, route, name, options, chunk)


@pytest.mark.parametrize("pads", [0, 9])
@pytest.mark.parametrize("chunk", [1, *CHUNKS])
@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("kind", list(CACHES))
def test_nor_with_other_options_and_padding(kind: str, route: str, chunk: int, pads: int) -> None:
    name, options = CACHES[kind]
    _check("llama", route, name, options, chunk, pads)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("kind", list(CACHES))
def test_nor_in_padded_rows_of_a_hybrid(kind: str, route: str) -> None:
    name, options = CACHES[kind]
    _check("gemma3", route, name, options, chunk=7, pads=9)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not FAMILIES[name].encoder_decoder and name != "doge"]
)
def test_dynamic_cache_has_no_leak(family: str, chunk: int) -> None:
    """Control: the check passes where nothing of ours runs. (Doge's own mask leaks on transformers 5.17.)"""
    model = model_for(family, "reference")
    logits = feed(model, _rows(0)[0], DynamicCache(config=model.config), chunk)
    assert _leak(logits) < 1e-5
    assert _effect(logits) > 1e-2


class _LeakyLayer(DynamicLayer):
    """Holds the last ten tokens and labels them from zero: the causal mask then lets later tokens through."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", 0) + key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = keys[:, :, -10:], values[:, :, -10:]
        return keys, values

    def get_seq_length(self) -> int:
        return getattr(self, "seen", 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + (self.keys.shape[-2] if self.is_initialized else 0), 0


def test_the_check_sees_a_leak() -> None:
    """Control: a cache with a wrong mask offset, which perplexity would praise, fails the check."""
    model = model_for("llama", "reference")
    cache = DynamicCache(config=model.config)
    cache.layers = [_LeakyLayer() for _ in cache.layers]
    assert _leak(feed(model, _rows(0)[0], cache, 16)) > 1e-2
