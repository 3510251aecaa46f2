"""Decode steps as replays: equal to eager steps in every mode, and eager again where a graph cannot be.

Without a GPU the stand-in of `tests/device.py` replays a tape, which like a CUDA graph keeps every host number of the
recorded run. `CTXOPT_DEBUG=1` compares each replay with an eager run of the same step.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers.generation.streamers import BaseStreamer

import hf_ctxopt
from hf_ctxopt.errors import ConfigError, IntegrityError
from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.integration.compiled import CompiledLayers
from hf_ctxopt.integration.decode_graph import DecodeGraph
from tests.device import pretend_gpu
from tests.families import FAMILIES, VOCAB, build
from tests.feeding import feed

IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
SINK = {"cache": "ctx_sink", "window": 12, "sinks": 3, "page_size": 8}
PAGED = {"cache": "ctx_paged", "page_size": 8}
GREEDY = {"attention_mask": MASK, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for a GPU."""
    with pretend_gpu(monkeypatch):
        yield


def both(model: nn.Module, options: dict[str, Any], **call: Any) -> tuple[Any, Any]:
    """`generate` with and without graphs."""
    outputs = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **options), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            outputs.append(model.generate(IDS, **{**GREEDY, "max_new_tokens": 24, **call}))
    return outputs[0], outputs[1]


def graph_stats(output: Any) -> dict[str, int]:
    """The graph's counters of the cache that `generate` returned."""
    found: dict[str, int] = cache_in(output).stats()["graph"]
    return found


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


# ---- where no graph can be


def steps(model: nn.Module, cache: Any, **more: Any) -> Any:
    """Three one-token steps after a prefill."""
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        for at in range(3):
            out = model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True, **more)
    return out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"labels": IDS[:, :1]}, "the argument labels"),
        ({"output_hidden_states": True}, "the argument output_hidden_states"),
    ],
)
def test_arguments(more: dict[str, Any], reason: str) -> None:
    model = build("llama")
    with hf_ctxopt.patched(model, **PAGED):
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
        steps(model, cache, **more)
    counted = cache.stats()["graph"]
    assert counted == {f"eager: {reason}": 3}


def test_a_mask_with_a_hole_runs_eagerly() -> None:
    model, hole = build("llama"), torch.ones(2, 26, dtype=torch.long)
    hole[1, 9] = 0
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **PAGED), torch.no_grad():
            cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
            model(input_ids=IDS, past_key_values=cache, attention_mask=hole[:, :20])
            for at in range(6):
                out = model(input_ids=IDS[:, at : at + 1], past_key_values=cache, attention_mask=hole[:, : 21 + at])
            logits.append(out.logits)
            cache.check_integrity()
    assert torch.allclose(*logits, atol=1e-5)
    assert cache.stats()["graph"] == {"eager: an attention mask that hides more than left padding": 6}


def test_hooks_and_training_run_eagerly() -> None:
    model = build("llama")
    seen: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with hf_ctxopt.patched(model, **PAGED):
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
        steps(model, cache)
        assert len(seen) == 4
        assert cache.stats()["graph"] == {"eager: a hook on model.layers.1.mlp": 3}
    handle.remove()
    with hf_ctxopt.patched(model.train(), **PAGED):
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
        steps(model, cache)
        assert cache.stats()["graph"] == {"eager: the model is in training mode": 3}


def test_a_model_that_reads_cached_states_by_itself_is_asked_once() -> None:
    want, got = both(build("diffllama"), PAGED)
    assert torch.equal(got.sequences, want.sequences)
    reason = "a layer's mask hides held tokens, or the model reads cached states by itself"
    assert graph_stats(got) == {"warm-ups": 1, f"eager: {reason}": 23}


def test_a_cache_and_its_graph_go_without_waiting_for_the_garbage_collector() -> None:
    model = build("llama")
    gc.collect()
    gc.disable()
    try:
        with hf_ctxopt.patched(model, **PAGED):
            got = model.generate(IDS, **{**GREEDY, "max_new_tokens": 8})
        assert graph_stats(got)["replays"] > 0
        cache = weakref.ref(cache_in(got))
        del got
        assert cache() is None
    finally:
        gc.enable()


def test_a_graph_does_not_outlive_a_change_of_the_model_between_calls() -> None:
    model, ids = build("llama"), IDS[1:]
    with hf_ctxopt.patched(model, **PAGED):
        first = model.generate(ids, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
        seen: list[int] = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        more = torch.cat([first.sequences, ids[:, :2]], dim=1)
        model.generate(more, do_sample=False, max_new_tokens=8, past_key_values=cache_in(first))
        handle.remove()
    assert len(seen) == 8


def test_outputs_asked_for_once_leave_graphs_possible() -> None:
    """transformers leaves its hooks on the model after a call with output_hidden_states."""
    model = build("llama")
    model(IDS, output_hidden_states=True)
    assert any(part._forward_hooks for part in model.modules())
    want, got = both(model, PAGED)
    assert torch.equal(got.sequences, want.sequences)
    assert graph_stats(got)["replays"] > 15


def test_repeated_rows_of_a_padded_cache() -> None:
    model = build("llama")
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **PAGED), torch.no_grad():
            cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=MASK)
            positions = (MASK.cumsum(-1) - 1).clamp(min=0)
            model(input_ids=IDS, attention_mask=MASK, position_ids=positions, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            mask = MASK.repeat_interleave(2, 0)
            for at in range(4):
                mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
                place = mask.sum(-1, keepdim=True) - 1
                out = model(
                    input_ids=IDS[:, at : at + 1].repeat_interleave(2, 0), attention_mask=mask, position_ids=place,
                    past_key_values=cache,
                )  # fmt: skip
            logits.append(out.logits)
    assert torch.allclose(*logits, atol=1e-5)
    assert cache.stats()["graph"]["replays"] >= 2


def test_padding_without_positions_is_left_to_the_model() -> None:
    model, mask = build("opt"), MASK
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **PAGED), torch.no_grad():
            cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=MASK)
            model(input_ids=IDS, attention_mask=MASK, past_key_values=cache)
            for at in range(3):
                mask = torch.cat([MASK, torch.ones(2, at + 1, dtype=torch.long)], 1)
                out = model(input_ids=IDS[:, at : at + 1], attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
    assert torch.allclose(*logits, atol=1e-5)
    assert cache.stats()["graph"] == {"eager: padding without position_ids": 3}


def test_hooks_that_move_nothing_are_captured_with_the_model() -> None:
    """`device_map="auto"` puts accelerate's hooks on quantized models even where there is one device."""
    model = build("llama")
    want = model.generate(IDS, **{**GREEDY, "max_new_tokens": 12})
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooked = vars(model)["forward"]
    with hf_ctxopt.patched(model, **PAGED):
        got = model.generate(IDS, **{**GREEDY, "max_new_tokens": 12})
        assert torch.equal(
            copy.deepcopy(model).generate(IDS, **{**GREEDY, "max_new_tokens": 12}).sequences, want.sequences
        )
    assert vars(model)["forward"] is hooked
    assert torch.equal(got.sequences, want.sequences)
    assert graph_stats(got)["replays"] >= 9, graph_stats(got)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("debug", [True, False])
def test_a_model_that_takes_numbers_from_the_host_is_found_out(
    monkeypatch: pytest.MonkeyPatch, debug: bool, bits: int
) -> None:
    """The recorded run's number is stale in the next replay: debug mode raises, otherwise steps run eagerly."""
    monkeypatch.setenv("CTXOPT_DEBUG", str(int(debug)))
    model = build("llama")
    embed, caches = model.model.embed_tokens, []
    original = embed.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return original(ids).roll(caches[-1].get_seq_length(), -1)

    monkeypatch.setattr(embed, "forward", forward)
    logits = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **PAGED):
            caches.append(hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, kv_bits=bits))
            # The first compared step begins by sealing a page: run a second time it must not seal again.
            if graph and debug:
                with pytest.raises(IntegrityError, match="differ from the eager"):
                    feed(model, IDS, caches[-1], 1, prefill=14)
                return
            logits.append(feed(model, IDS, caches[-1], 1, prefill=14))
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)
    counted = caches[-1].stats()["graph"]
    assert counted["replays"] == counted["captures"], counted  # only those of the captured steps themselves
    assert counted["eager: the replayed step's logits differ from the eager ones"] >= 2, counted


def test_options_are_checked() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="graph"):
        hf_ctxopt.patch_model(model, graph=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compile"):
        hf_ctxopt.patch_model(model, graph=False, compile=True)
    assert "forward" not in vars(model)


def test_the_forward_of_a_patched_model() -> None:
    model = build("llama")
    plain = inspect.signature(model.forward)
    hf_ctxopt.patch_model(model, **PAGED)
    assert inspect.signature(model.forward) == plain
    twin = copy.deepcopy(model)
    assert vars(twin)["forward"]._alive() is twin
    loaded = pickle.loads(pickle.dumps(model))
    assert vars(loaded)["forward"]._alive() is loaded
    hf_ctxopt.unpatch_model(model)
    assert "forward" not in vars(model)
    assert isinstance(vars(twin)["forward"], DecodeGraph)


def test_compiled_layers_come_and_go() -> None:
    model = build("llama")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layers, ids = CompiledLayers(backend=backend), IDS[1:]
    with torch.no_grad():
        want = model(ids).logits
        with layers.inside(model):
            assert all("forward" in vars(layer) for layer in model.model.layers)
            assert torch.allclose(model(ids).logits, want, atol=1e-5)
    assert graphs
    assert not any("forward" in vars(layer) for layer in model.model.layers)
