"""Where no decode graph can be: steps run eagerly, say why once, and give the same logits."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import hf_ctxopt
from hf_ctxopt.errors import ConfigError, IntegrityError
from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.integration.compiled import CompiledLayers
from hf_ctxopt.integration.decode_graph import DecodeGraph
from tests.families import build
from tests.feeding import feed
from tests.integration.graph_rig import GREEDY, IDS, MASK, PAGED, both, gpu, graph_stats

__all__ = ["gpu"]


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
    assert sum(counted[key] for key in counted if "the replayed step's logits differ" in key) >= 2, counted


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
