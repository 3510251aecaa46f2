"""States must fit the pages they go into, and `torch.autocast` neither stops a cache nor changes what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.integration.graph_rules import read_step
from tests.families import VOCAB, build
from tests.feeding import feed, routed

IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))


def _autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_autocast(name: str, route: str, kv_bits: int) -> None:
    model = build("llama")
    options = {"page_size": 4, "kv_bits": kv_bits} | ({"window": 64} if name == "ctx_sink" else {})
    with _autocast(), routed(route, model, name, **options):
        cache = hf_ctxopt.make_cache(model, name, **options)
        got = feed(model, IDS, cache, 1, prefill=9)
    with _autocast():
        expected = feed(model, IDS, transformers.DynamicCache(config=model.config), 1, prefill=9)
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0)
    cache.check_integrity()
    storage = cache.groups[0].storages[0]
    assert {storage.keys.dtype, storage.values.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_autocast_leaves_float64_alone(route: str) -> None:
    model = build("llama").double()
    with _autocast(), routed(route, model, "ctx_paged"):
        got = feed(model, IDS, hf_ctxopt.make_cache(model, "ctx_paged"), 1, prefill=9)
    expected = feed(model, IDS, transformers.DynamicCache(config=model.config), 1, prefill=9)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_prefix_store_does_not_mix_states_from_inside_autocast_with_others() -> None:
    model, options = build("llama"), {"store": "autocast", "page_size": 4}
    try:
        settings = {"max_new_tokens": 2, "cache_implementation": "ctx_prefix", "cache_config": options}
        model.generate(IDS, **settings)
        with _autocast(), pytest.raises(ConfigError, match=r"store='autocast'.*layout"):
            model.generate(IDS, **settings)
    finally:
        hf_ctxopt.drop_store("autocast")


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_a_step_outside_autocast_after_one_inside_is_refused(route: str, kv_bits: int) -> None:
    model = build("llama")
    with routed(route, model, "ctx_paged"):
        cache, whole = (hf_ctxopt.make_cache(model, "ctx_paged", page_size=4, kv_bits=kv_bits) for _ in range(2))
        with _autocast():
            expected = feed(model, IDS[:, :12], whole, 1, prefill=9)
            feed(model, IDS[:, :9], cache, 9)
        held = cache.stats()
        for count in (1, 3):
            with pytest.raises(ConfigError, match=r"dtype=torch\.float32.*bfloat16.*autocast"):
                feed(model, IDS[:, 9 : 9 + count], cache, count)
        assert cache.stats() == held
        with _autocast():
            assert torch.equal(feed(model, IDS[:, 9:12], cache, 1), expected[:, 9:])


def test_fewer_bits_are_the_same_inside_autocast() -> None:
    model = build("llama")
    caches = [hf_ctxopt.make_cache(model, "ctx_paged", page_size=4) for _ in range(2)]
    for cache in caches:
        feed(model, IDS, cache, 20)
    caches[0].requantize(4)
    with _autocast():
        caches[1].requantize(4)
    for one, other in zip(*(cache.groups[0].storages[1].tensors for cache in caches), strict=True):
        assert torch.equal(one, other)


def _heads(states: Tensor) -> Tensor:
    return states[:, :1]


def _wide(states: Tensor) -> Tensor:
    return torch.cat([states, states], -1)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize(("change", "said"), [
    (_heads, "1 heads of 16"), (_wide, "2 heads of 32"), (Tensor.double, "float64"), (Tensor.bfloat16, "bfloat16"),
])  # fmt: skip
def test_states_that_do_not_fit_the_pages(part: str, change: Callable[[Tensor], Tensor], said: str) -> None:
    cache = hf_ctxopt.make_cache(build("llama"), "ctx_paged", page_size=4)
    states = [torch.randn(1, 2, 3, 16) for _ in range(2)]
    for layer in range(2):
        cache.update(*states, layer)
    held = cache.stats()
    at = ("key", "value").index(part)
    wrong = [change(each) if place == at else each for place, each in enumerate(states)]
    with pytest.raises(ConfigError, match=rf"{part}_states.*{said}.*layer 0"):
        cache.update(*wrong, 0)
    assert cache.stats() == held
    for layer in range(2):
        cache.update(*states, layer)
    assert cache.get_seq_length() == 6


def test_keys_and_values_of_unequal_length() -> None:
    cache = hf_ctxopt.make_cache(build("llama"), "ctx_paged", page_size=4)
    with pytest.raises(ConfigError, match=r"value_states=\(1, 2, 1, 16\).*as keys, \(1, 2, 3, 16\)"):
        cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 0


def test_no_graph_is_captured_inside_autocast() -> None:
    """Its copies of the weights are gone when it ends; a replay would read them."""
    model = build("llama")
    cache = hf_ctxopt.make_cache(model, "ctx_paged")
    feed(model, IDS, cache, 20)
    call = {"input_ids": IDS[:, :1], "past_key_values": cache}
    with torch.no_grad():
        assert not isinstance(read_step(cache, call), str)
        with _autocast():
            assert read_step(cache, call) == "torch.autocast is on"
