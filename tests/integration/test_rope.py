"""Rotary facts, found by asking the model, hold for real forward passes.

Long streams never leave the positions that a model knows, and how they are cut into eras changes nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.rope import decoder_of, position_facts
from hf_ctxopt.kernels.rotate import rotate
from tests.families import VOCAB, build
from tests.feeding import feed, pad_left, routed
from tests.streaming_reference import contiguous_logits

LENGTH = 2048
SMALL = {"window": 16, "sinks": 2, "page_size": 4}
TEXT = torch.randint(2, VOCAB, (192,), generator=torch.Generator().manual_seed(9))
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def _family(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: build(name, **{"max_position_embeddings": LENGTH, **changes})


def _stablelm() -> nn.Module:
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**SHAPE)).eval()


def _smollm3() -> nn.Module:
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1, 0])).eval()


def _cohere2() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Cohere2Config(**SHAPE, layer_types=kinds, sliding_window=10)
    return transformers.Cohere2ForCausalLM(config).eval()


# model, first rotated channel, rotated channels, interleaved, layers that rotate
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, bool, list[int]]] = {
    "llama": (_family("llama"), 0, 16, False, [0, 1]),
    "llama3": (_family("llama3_rope"), 0, 16, False, [0, 1]),
    "linear": (_family("linear_rope"), 0, 16, False, [0, 1]),
    "yarn": (_family("yarn_rope"), 0, 16, False, [0, 1]),
    "dynamic": (_family("dynamic_rope"), 0, 16, False, [0, 1]),
    "longrope": (_family("longrope", original_max_position_embeddings=LENGTH), 0, 16, False, [0, 1]),
    "phi, partial": (_family("phi"), 0, 8, False, [0, 1]),
    "gpt_neox, partial": (_family("gpt_neox"), 0, 4, False, [0, 1]),
    "stablelm, partial": (_stablelm, 0, 4, False, [0, 1, 2, 3]),
    "cohere, interleaved": (_family("cohere"), 0, 16, True, [0, 1]),
    "glm, partial, interleaved": (_family("glm"), 0, 8, True, [0, 1]),
    "qwen3, normed": (_family("qwen3"), 0, 16, False, [0, 1]),
    "gemma3, by type": (_family("gemma3"), 0, 16, False, [0, 1, 2]),
    "gpt_oss": (_family("gpt_oss"), 0, 16, False, [0, 1, 2]),
    "smollm3, some layers": (_smollm3, 0, 16, False, [0, 2]),
    "cohere2, sliding layers": (_cohere2, 0, 16, True, [0, 2]),
}


def _keys(model: nn.Module, position: int) -> list[torch.Tensor]:
    """Each layer's cached keys of eight tokens from `position` on, `(1, kv_heads, 8, head_dim)`."""
    cache = DynamicCache(config=model.config)
    places = torch.arange(position, position + 8)[None]
    with torch.no_grad():
        decoder_of(model)(input_ids=TEXT[None, :8], position_ids=places, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("name", MODELS)
def test_turned_keys_are_the_keys_of_later_positions(name: str) -> None:
    make, start, width, interleaved, layers = MODELS[name]
    model = make()
    facts = position_facts(model)
    assert facts.refusal is None
    assert facts.table is None
    assert sorted(facts.rotary) == layers
    for found in facts.rotary.values():
        assert (found.start, 2 * found.inv_freq().numel(), found.interleaved) == (start, width, interleaved)
    here = _keys(model, 5)
    # The model's own angles are float32: a thousand positions later they are wrong by up to 1000 * 2**-24.
    for delta, tolerance in ((3, 1e-5), (1000, 6e-5)):
        for index, (first, second) in enumerate(zip(here, _keys(model, 5 + delta), strict=True)):
            turned = rotate(first, delta, facts.rotary[index]) if index in facts.rotary else first
            assert (turned - second).abs().max() <= tolerance * second.abs().max(), (index, delta)


def test_each_layer_has_the_frequencies_of_its_own_type() -> None:
    model = build("gemma3")
    rotary, facts = model.model.rotary_emb, position_facts(model).rotary
    for index, kind in enumerate(model.config.layer_types):
        assert torch.equal(facts[index].inv_freq(), getattr(rotary, f"{kind}_inv_freq"))
    assert not torch.equal(facts[0].inv_freq(), facts[1].inv_freq())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "phi", "glm", "cohere", "longrope"])
def test_half_precision_finds_the_same_layout(family: str, dtype: torch.dtype) -> None:
    expected, found = (position_facts(build(family, dtype=kind)).rotary for kind in (torch.float32, dtype))
    assert [(f.start, f.interleaved) for f in found.values()] == [(f.start, f.interleaved) for f in expected.values()]


def test_the_probe_leaves_the_model_as_it_was() -> None:
    for family in ("dynamic_rope", "longrope"):
        model = build(family)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        position_facts(model)
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("busy")], ids=["memory", "other"])
def test_a_probe_that_failed_is_tried_again(error: RuntimeError) -> None:
    """Memory that was short for a moment must not refuse eviction for the rest of the model's life."""
    model = build("llama")
    with mock.patch.object(type(model.model), "forward", side_effect=error, autospec=True):
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                position_facts(model)
        else:
            assert "busy" in str(position_facts(model).refusal)
    facts = position_facts(model)
    assert facts.refusal is None
    assert len(facts.rotary) == len(model.model.layers)


# ---- frequencies that depend on the length


TRAINED, SINKS, WINDOW = 64, 4, 28


@functools.cache
def _scaled(family: str) -> nn.Module:
    """One layer, trained for 64 positions: a third of what it will read."""
    if family == "dynamic_rope":
        return build(family, max_position_embeddings=TRAINED, num_hidden_layers=1)
    parameters = {**build(family).config.rope_parameters, "original_max_position_embeddings": TRAINED}
    return build(
        family, rope_parameters=parameters, original_max_position_embeddings=TRAINED, num_hidden_layers=1,
        max_position_embeddings=8 * TRAINED,
    )  # fmt: skip


def _watch(model: nn.Module) -> tuple[list[torch.Tensor], Any]:
    """The frequencies that each forward pass really used."""
    rotary, seen = model.model.rotary_emb, []
    return seen, rotary.register_forward_hook(lambda module, args, out: seen.append(module.inv_freq.clone()))


@pytest.mark.parametrize("family", ["dynamic_rope", "longrope"])
@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 7), ("fused", 32)])
def test_length_scaled_frequencies_never_change(family: str, route: str, chunk: int) -> None:
    """Three times the trained length is read; every token sees what a fresh short text would have shown it."""
    model = _scaled(family)
    expected = contiguous_logits(model, TEXT, SINKS, WINDOW)
    options = {"sinks": SINKS, "window": WINDOW, "page_size": 8}
    seen, hook = _watch(model)
    with routed(route, model, "ctx_sink", **options):
        got = feed(model, TEXT[None], hf_ctxopt.make_cache(model, "ctx_sink", **options), chunk)[0]
    hook.remove()
    assert all(torch.equal(used, seen[0]) for used in seen)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["dynamic_rope", "longrope"])
def test_the_same_inside_generate(family: str) -> None:
    """The prompt is three times the trained length already: generate reads it in chunks that fit."""
    model = _scaled(family)
    options = {"sinks": SINKS, "window": WINDOW, "page_size": 8}
    seen, hook = _watch(model)
    with hf_ctxopt.patched(model, "ctx_sink", **options):
        out = model.generate(
            TEXT[None], max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    hook.remove()
    assert all(torch.equal(used, seen[0]) for used in seen)
    expected = contiguous_logits(model, out.sequences[0, :-1], SINKS, WINDOW)[-8:]
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=0)


def test_without_eras_the_frequencies_would_change() -> None:
    """The two tests above could not fail otherwise."""
    model = _scaled("dynamic_rope")
    cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=SINKS, window=WINDOW)
    cache.context.ledger.span = None
    seen, hook = _watch(model)
    feed(model, TEXT[None], cache, 1)
    hook.remove()
    assert not all(torch.equal(used, seen[0]) for used in seen)


# ---- eras


def _stream(
    model: nn.Module, route: str, span: int | None, chunk: int, rows: list[torch.Tensor], **more: Any
) -> torch.Tensor:
    options = {"sinks": 3, "window": 16, "page_size": 4, **more}
    ids, mask = pad_left(rows)
    padding = None if bool(mask.all()) else mask
    with routed(route, model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", attention_mask=padding, **options)
        cache.context.ledger.span = span
        logits = feed(model, ids, cache, chunk, 9, padding)
    assert (cache.context.ledger.base > 0) == (span is not None)
    return logits


@pytest.mark.parametrize(("route", "chunk"), [("dense", 1), ("fused", 1), ("fused", 7)])
@pytest.mark.parametrize("family", ["llama", "glm", "gemma3", "gpt_oss"])
def test_eras_change_nothing(family: str, route: str, chunk: int) -> None:
    """Also where an era is shorter than the window, so that one query meets keys of several."""
    model, rows = _model(family), [TEXT[:70], TEXT[20:83]]
    expected = _stream(model, route, None, chunk, rows)
    for span in (12, 25):
        got = _stream(model, route, span, chunk, rows)
        torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(got[1, 7:], expected[1, 7:], atol=1e-4, rtol=0)


@functools.cache
def _model(family: str) -> nn.Module:
    return build(family)


@pytest.mark.parametrize("name", ["smollm3, some layers", "cohere2, sliding layers", "phi, partial"])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_eras_where_some_layers_or_channels_do_not_rotate(name: str, route: str) -> None:
    model = MODELS[name][0]()
    expected, got = (_stream(model, route, span, 1, [TEXT[:60]]) for span in (None, 20))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_eras_with_context_shift(route: str) -> None:
    expected, got = (_stream(_model("llama"), route, span, 1, [TEXT[:90]], n_discard=5) for span in (None, 24))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_tokens_can_be_taken_back_over_the_edge_of_an_era(route: str) -> None:
    model, options = _model("llama"), {"sinks": 3, "window": 16, "page_size": 4}
    expected = _stream(model, route, None, 1, [TEXT[:60]])
    with routed(route, model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", **options)
        cache.context.ledger.span = 20
        parts = [feed(model, TEXT[None, :39], cache, 1)]
        cache.activate_past_recording()
        base = cache.context.ledger.base
        feed(model, TEXT[None, 100:103], cache, 3)
        assert cache.context.ledger.base > base
        cache.crop(-3)
        assert cache.context.ledger.base == base
        parts.append(feed(model, TEXT[None, 39:60], cache, 1))
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("jump", [4_000, 1_000_000, 4_000_000])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_far_into_a_stream(route: str, jump: int) -> None:
    """Text after the sinks reads the same whether four or four million tokens were dropped before it."""
    model, options = _model("llama"), {"sinks": 4, "window": 32}
    logits = []
    with routed(route, model, "ctx_sink", **options):
        for skipped in (1, jump):
            cache = hf_ctxopt.make_cache(model, "ctx_sink", **options)
            feed(model, TEXT[None, :4], cache, 4)
            hf_ctxopt.testing.skip(cache, skipped)
            assert cache.get_seq_length() == 4 + skipped
            logits.append(feed(model, TEXT[None, 4:60], cache, 1))
            cache.check_integrity()
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


def test_a_decoder_that_is_called_with_positional_arguments() -> None:
    model = _model("llama")
    calls: list[Callable[[torch.Tensor, torch.Tensor, Any], Any]] = [
        lambda ids, places, cache: model.model(input_ids=ids, position_ids=places, past_key_values=cache),
        lambda ids, places, cache: model.model(input_ids=ids, position_ids=places, **{generate_argument(): cache}),
        lambda ids, places, cache: model.model(ids, None, places, cache),
        lambda ids, places, cache: model.model(ids, None, None, cache),
        lambda ids, places, cache: model.model(ids, past_key_values=cache),
        lambda ids, places, cache: model.model(None, None, places, cache, model.model.embed_tokens(ids)),
    ]
    states = []
    for call in calls:
        cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=3, window=16)
        cache.context.ledger.span = 20
        with torch.no_grad():
            parts = [call(TEXT[None, at : at + 1], torch.tensor([[at]]), cache)[0] for at in range(60)]
        assert cache.context.ledger.base > 0
        states.append(torch.cat(parts, 1))
    assert all(torch.equal(other, states[0]) for other in states)


# ---- the hook on the decoder


def _sink(model: nn.Module) -> Any:
    cache = hf_ctxopt.make_cache(model, "ctx_sink", **SMALL)
    cache.context.ledger.span = 40
    return cache


def test_the_position_hook_goes_with_the_last_cache() -> None:
    model = build("llama")
    first, second = _sink(model), _sink(model)
    feed(model, TEXT[None, :90], first, 30)
    assert len(model.model._forward_pre_hooks) == 1
    del first
    assert len(model.model._forward_pre_hooks) == 1
    del second
    gc.collect()
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_cache_dropped_by_another_hook_of_the_decoder() -> None:
    """As another thread may: our hook is gone while torch still has it in its list for this forward pass."""
    model, held = build("llama"), []
    handle = model.model.register_forward_pre_hook(lambda module, args: held.clear())
    held.append(_sink(model))
    with torch.no_grad():
        model(TEXT[None, :9])
    handle.remove()
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("patch", [False, True], ids=["dense", "fused"])
def test_a_copied_cache_goes_on_as_the_original_does(patch: bool) -> None:
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", **SMALL) if patch else build("llama")
    cache = _sink(model)
    feed(model, TEXT[None, :50], cache, 1)
    twin = copy.deepcopy(cache)
    expected = feed(model, TEXT[None, 50:90], cache, 1)
    del cache
    gc.collect()
    assert len(model.model._forward_pre_hooks) == 1
    assert torch.equal(feed(model, TEXT[None, 50:90], twin, 1), expected)
    twin.check_integrity()
    assert twin.stats()["bytes_held"] == twin.nbytes > 0
    del twin
    gc.collect()
    assert not model.model._forward_pre_hooks


def test_a_model_copied_while_a_cache_is_alive() -> None:
    model = build("llama")
    cache = _sink(model)
    expected = feed(model, TEXT[None, :90], cache, 1)
    twin = copy.deepcopy(model)
    assert torch.equal(feed(twin, TEXT[None, :90], _sink(twin), 1), expected)
