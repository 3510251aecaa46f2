"""Padding that a cache was not told of when it was made: learned from the mask, forgotten at a reset, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_ctxopt
from hf_ctxopt.errors import ConfigError
from hf_ctxopt.integration.compat import generate_argument
from tests.families import VOCAB, build
from tests.feeding import feed, pad_left, routed

CACHE = generate_argument()
ROWS = [torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 5)]
IDS, MASK = pad_left(ROWS)
ROOM = {"ctx_paged": {"page_size": 4}, "ctx_sink": {"page_size": 4, "window": 64}}
SMALL = {"page_size": 4, "window": 8, "sinks": 2}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}

route = pytest.mark.parametrize("route", ["dense", "fused"])


@route
@pytest.mark.parametrize("name", ROOM)
def test_generate_tells_an_empty_cache_the_padding(route: str, name: str) -> None:
    model = build("llama")
    want = model.generate(IDS, attention_mask=MASK, max_new_tokens=10, **GREEDY)
    with routed(route, model, name, **ROOM[name]):
        cache = hf_ctxopt.make_cache(model, name, **ROOM[name])
        got = model.generate(IDS, attention_mask=MASK, max_new_tokens=10, **{CACHE: cache}, **GREEDY)
    assert torch.equal(got, want)
    assert [row.pad for row in cache.groups[0].rows] == [0, 7]


@route
def test_a_padded_row_keeps_its_own_sinks(route: str) -> None:
    model = build("llama")
    with routed(route, model, "ctx_sink", **SMALL):
        call = {"max_new_tokens": 20, **GREEDY}
        named = {"cache_implementation": "ctx_sink", "cache_config": SMALL}
        want = model.generate(IDS, attention_mask=MASK, **call, **named)
        given = hf_ctxopt.make_cache(model, "ctx_sink", **SMALL)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, **call, **{CACHE: given}), want)


@route
@pytest.mark.parametrize("name", ROOM)
@torch.no_grad()
def test_forward_passes_may_bring_padding_that_nobody_announced(route: str, name: str) -> None:
    model, small = build("llama"), {**ROOM[name], **(SMALL if name == "ctx_sink" else {})}
    with routed(route, model, name, **small):
        told = feed(model, IDS, hf_ctxopt.make_cache(model, name, attention_mask=MASK, **small), 1, mask=MASK)
        got = feed(model, IDS, hf_ctxopt.make_cache(model, name, **small), 1, mask=MASK)
    torch.testing.assert_close(got[MASK.bool()], told[MASK.bool()], atol=1e-4, rtol=0)


@route
def test_a_reset_forgets_padding_and_batch(route: str) -> None:
    model = build("llama")
    text = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    want = model.generate(text, max_new_tokens=8, **GREEDY)
    with routed(route, model, "ctx_paged"):
        cache = hf_ctxopt.make_cache(model, "ctx_paged", attention_mask=MASK)
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4, **{CACHE: cache}, **GREEDY)
        cache.reset()
        assert torch.equal(model.generate(text, max_new_tokens=8, **{CACHE: cache}, **GREEDY), want)


def test_an_interrupted_first_step_leaves_room_for_another_batch() -> None:
    model: Any = build("llama")
    cache = hf_ctxopt.make_cache(model, "ctx_paged")

    def stop(*_: object) -> None:
        raise KeyError("stop")

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        model(IDS, **{CACHE: cache})
    handle.remove()
    cache.settle()
    model(IDS[:1], **{CACHE: cache})
    assert cache.get_seq_length() == IDS.shape[1]


def test_beams_over_an_empty_cache_that_knew_the_padding() -> None:
    model = build("llama")
    call = {"attention_mask": MASK, "num_beams": 2, "max_new_tokens": 5, **GREEDY}
    want = model.generate(IDS, **call)
    cache = hf_ctxopt.make_cache(model, "ctx_paged", attention_mask=MASK)
    assert torch.equal(model.generate(IDS, **call, **{CACHE: cache}), want)


def test_zeros_inside_the_mask_are_refused_where_stock_attention_would_hide_the_sinks() -> None:
    model = build("llama")
    mask = torch.ones_like(IDS)
    mask[0, 3:6] = 0
    call = {"attention_mask": mask, "max_new_tokens": 20, **GREEDY}
    with pytest.raises(ConfigError, match="attention_mask"):
        model.generate(IDS, cache_implementation="ctx_sink", cache_config=SMALL, **call)
    cache = hf_ctxopt.make_cache(model, "ctx_sink", **SMALL)
    with pytest.raises(ConfigError, match="attention_mask"):
        model.generate(IDS, **call, **{CACHE: cache})
    assert cache.nbytes == 0
    room = {"cache_implementation": "ctx_sink", "cache_config": {"window": 64}}
    assert torch.equal(model.generate(IDS, **call, **room), model.generate(IDS, **call))
    with hf_ctxopt.patched(model):
        model.generate(IDS, cache_implementation="ctx_sink", cache_config=SMALL, **call)


@torch.no_grad()
def test_both_routes_agree_where_the_first_layer_does_not_rotate() -> None:
    config = transformers.SmolLM3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, no_rope_layers=[0, 1], pad_token_id=0, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.SmolLM3ForCausalLM(config).eval()
    text = torch.randint(2, VOCAB, (1, 24))
    logits = []
    for way in ("dense", "fused"):
        with routed(way, model, "ctx_sink", **SMALL):
            logits.append(feed(model, text, hf_ctxopt.make_cache(model, "ctx_sink", **SMALL), 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_a_model_in_training_mode_is_probed_without_dropout() -> None:
    model = build("llama", attention_dropout=0.5).train()
    cache = hf_ctxopt.make_cache(model, "ctx_sink", **SMALL)
    assert cache.guard is not None
    assert all(module.training for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_dtype_in_mid_stream_is_stored_as_the_first(family: str) -> None:
    model = build(family)
    cache = hf_ctxopt.make_cache(model, "ctx_paged")
    model(IDS[:1], **{CACHE: cache})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS[:1], **{CACHE: cache})
    cache.check_integrity()
    assert cache.get_seq_length() == 2 * IDS.shape[1]
