"""Decode steps as replays: equal to eager steps in every mode, and eager again where a graph cannot be.

Without a GPU the stand-in of `tests/device.py` replays a tape, which like a CUDA graph keeps every host number of the
recorded run. `CTXOPT_DEBUG=1` compares each replay with an eager run of the same step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import hf_ctxopt
from hf_ctxopt.integration.compat import cache_in
from tests.families import FAMILIES, VOCAB, build
from tests.feeding import feed
from tests.integration.graph_rig import GREEDY, IDS, MASK, PAGED, SINK, both, gpu, graph_stats

__all__ = ["gpu"]


FUSED = [
    name
    for name, family in FAMILIES.items()
    if family.fused and family.positions == "rope" and family.builds_dense is None and name != "deepseek_v3"
]


@pytest.mark.parametrize("options", [PAGED, {**SINK, "kv_bits": 4}], ids=["paged", "sink-int4"])
@pytest.mark.parametrize("name", FUSED)
def test_families(name: str, options: dict[str, Any]) -> None:
    want, got = both(build(name), options)
    assert torch.equal(got.sequences, want.sequences)
    assert float((torch.stack(got.logits) - torch.stack(want.logits)).abs().max()) < 1e-4
    counted = graph_stats(got)
    assert counted["replays"] >= 15, counted
    assert not any(key.startswith("eager") for key in counted), counted
    assert not cache_in(got).stats()["fallbacks"]


@pytest.mark.parametrize(
    "call",
    [
        {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3}, {"prefill_chunk_size": 7},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=lambda call: "-".join(call),
)  # fmt: skip
@pytest.mark.parametrize("options", [PAGED, {**SINK, "kv_bits": {"k": 8, "v": 4}}], ids=["paged", "sink-k8v4"])
def test_modes(options: dict[str, Any], call: dict[str, Any]) -> None:
    want, got = both(build("llama"), options, **call)
    assert torch.equal(got.sequences, want.sequences)
    assert graph_stats(got)["replays"] > 0


@pytest.mark.parametrize("lookup", [{"prompt_lookup_num_tokens": 3}])
def test_assisted_steps_share_the_cache_with_replays(lookup: dict[str, int]) -> None:
    """Steps of several candidates are eager, steps of one are replayed, and crops fall in between."""
    model, ids = build("llama"), IDS[1:, :6].repeat(1, 3)
    call = {"do_sample": False, "max_new_tokens": 20, **lookup}
    want = model.generate(ids, **call)
    with hf_ctxopt.patched(model, **PAGED):
        got = model.generate(ids, return_dict_in_generate=True, **call)
    assert torch.equal(got.sequences, want)
    assert graph_stats(got)["replays"] > 0


def test_two_hundred_steps_through_seals_growth_and_eviction() -> None:
    """Every replay is compared with an eager step by `CTXOPT_DEBUG=1`, which raises."""
    model = build("llama", max_position_embeddings=1024)
    for options in ({**PAGED, "kv_bits": 4}, {**SINK, "window": 50, "kv_bits": 2}, {**SINK, "n_discard": 5}):
        with hf_ctxopt.patched(model, **options):
            output = model.generate(IDS, **{**GREEDY, "max_new_tokens": 200})
        counted, pages = graph_stats(output), cache_in(output).stats()["pages"]
        assert counted["replays"] > 150, counted
        assert pages["sealed"] > 0 or "kv_bits" not in options


def test_streamers_and_stopping_criteria_see_every_token() -> None:
    class Sink(BaseStreamer):
        tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    seen: list[int] = []

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(ids.shape[1])
        return torch.full((ids.shape[0],), ids.shape[1] >= 32, dtype=torch.bool)

    model, sink = build("llama"), Sink()
    with hf_ctxopt.patched(model, **PAGED):
        call = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
        found = model.generate(IDS[1:], streamer=sink, stopping_criteria=[stop], **call)
    out = found.sequences
    assert graph_stats(found)["replays"] > 5
    assert seen == list(range(21, 33))
    assert sink.tokens == [*out[0].tolist(), -1]


def test_a_returned_cache_goes_on() -> None:
    model = build("llama")
    texts = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **SINK):
            first = model.generate(IDS, **{**GREEDY, "max_new_tokens": 10})
            more = torch.cat([first.sequences, IDS[:, 5:10]], dim=1)
            mask = torch.cat([MASK, torch.ones(2, more.shape[1] - 20, dtype=torch.long)], dim=1)
            second = model.generate(
                more, attention_mask=mask, do_sample=False, max_new_tokens=10, past_key_values=cache_in(first)
            )
        texts.append(second)
        assert (graph_stats(first).get("replays", 0) > 12) == graph  # of both turns: it is one cache
    assert torch.equal(*texts)


def test_eras_in_the_window_take_more_variants() -> None:
    """A manual loop over several position eras; the sinks and two eras are met by three turned queries."""
    model, text = build("llama"), torch.randint(2, VOCAB, (1, 90), generator=torch.Generator().manual_seed(8))
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **SINK):
            cache = hf_ctxopt.make_cache(
                model, **{"name": "ctx_sink", **{k: v for k, v in SINK.items() if k != "cache"}}
            )
            cache.context.ledger.span = 30
            logits.append(feed(model, text, cache, 1, prefill=4))
    assert float((logits[0] - logits[1]).abs().max()) < 1e-4
    counted = cache.stats()["graph"]
    assert counted["replays"] > 60
    assert max(state.variants for state in cache.context.decoders.values()) == 3


def test_crop_and_reorder_between_replays() -> None:
    model, ids = build("llama"), IDS[:, 6:]
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **{**PAGED, "kv_bits": 8}):
            cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, kv_bits=8)
            feed(model, ids, cache, 1, prefill=5)
            cache.crop(-5)
            cache.reorder_cache(torch.tensor([1, 1]))
            logits.append(feed(model, ids[:, :9], cache, 1))
            cache.reset()
            logits.append(feed(model, ids, cache, 1, prefill=5))
            cache.check_integrity()
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert torch.allclose(logits[1], logits[3], atol=1e-4)
