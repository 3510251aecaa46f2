"""Budgets in a whole model: a step that does not fit is refused, nothing has changed, and the text goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.errors import CacheFullError
from tests.families import VOCAB
from tests.faults.runs import Collector, Scene

PAGE = 4
ROUTES = pytest.mark.parametrize("route", ["dense", "fused"])
IDS = torch.randint(2, VOCAB, (1, 60), generator=torch.Generator().manual_seed(3))
TOKEN_BYTES = {"llama": 2 * 2 * 2 * 16 * 4, "gemma3": 3 * 2 * 2 * 16 * 4}
"""Layers x (K and V) x KV heads x head size x float32: bytes of one token over all layers."""


def scene_of(family: str, route: str, budget: int | str, **options: Any) -> Scene:
    """A `ctx_paged` scene under a budget."""
    return Scene(name="", family=family, route=route, options={"page_size": PAGE, "budget": budget, **options})


def raise_limit(cache: PageCache, factor: int) -> None:
    """What a user who has freed memory does."""
    budget = cache.groups[0].budget
    budget.tokens = None if budget.tokens is None else budget.tokens * factor
    budget.nbytes = None if budget.nbytes is None else budget.nbytes * factor


def check_refusal(scene: Scene, held: int, tried: int, fits: int, room: int) -> None:
    """Holds `held` tokens, is refused `tried` more, then goes on with `fits`, then with more under a higher limit."""
    model = scene.model
    with scene.routed(), torch.no_grad():
        unlimited = Scene(name="", family=scene.family, route=scene.route, options={"page_size": PAGE})
        expected = model(IDS, past_key_values=unlimited.make_cache()).logits
        cache = scene.make_cache()
        model(IDS[:, :held], past_key_values=cache)
        was = cache.stats()
        with pytest.raises(CacheFullError) as caught:
            model(IDS[:, held : held + tried], past_key_values=cache)
        error = caught.value
        assert error.needed == -(-(held + tried) // PAGE) * PAGE
        assert error.room == room
        assert "`budget`" in error.option
        assert all(str(part) in str(error) for part in (error.needed, error.room, error.option))
        assert cache.stats() == was
        cache.check_integrity()
        for start, stop in ((held, held + fits), (held + fits, held + fits + tried)):
            if stop > room:
                raise_limit(cache, 4)
            logits = model(IDS[:, start:stop], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, start:stop], atol=1e-4, rtol=0)


@ROUTES
@pytest.mark.parametrize("budget", [24, 27, f"{24 * TOKEN_BYTES['llama']}B"])
def test_a_step_over_the_budget(route: str, budget: int | str) -> None:
    check_refusal(scene_of("llama", route, budget), held=18, tried=7, fits=6, room=24)


@ROUTES
@pytest.mark.parametrize("tried", [9, 20], ids=["chunk_in_the_window", "chunk_longer_than_the_window"])
def test_a_step_over_the_budget_of_a_hybrid_models_full_layers(route: str, tried: int) -> None:
    """The sliding layers come first and have room; the full layer has not. Still nothing may change."""
    check_refusal(scene_of("gemma3", route, 24), held=18, tried=tried, fits=6, room=24)


@ROUTES
def test_a_byte_budget_is_shared_by_a_hybrid_models_groups(route: str) -> None:
    """Two sliding layers need 4 pages each; what is left of the bytes is the full layer's."""
    one_layer = TOKEN_BYTES["gemma3"] // 3
    sliding = 4 * PAGE * 2 * one_layer
    scene = scene_of("gemma3", route, f"{sliding + 24 * one_layer}B")
    check_refusal(scene, held=18, tried=9, fits=6, room=24)


def test_a_first_chunk_over_the_budget_leaves_an_empty_cache() -> None:
    for family in ("llama", "gemma3"):
        scene = scene_of(family, "dense", 24)
        with torch.no_grad():
            cache = scene.make_cache()
            with pytest.raises(CacheFullError):
                scene.model(IDS, past_key_values=cache)
            assert cache.get_seq_length() == 0
            assert cache.stats()["pages"]["used"] == 0
            logits = scene.model(IDS[:, :9], past_key_values=cache).logits
            expected = scene.model(IDS[:, :9]).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@ROUTES
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_generate_runs_to_the_budget_and_on_after_it_is_raised(family: str, route: str, unit: str) -> None:
    budget: int | str = 20 if unit == "tokens" else f"{24 * TOKEN_BYTES[family]}B"
    scene = scene_of(family, route, budget)
    unlimited = Scene(name="", family=family, route=route, options={"page_size": PAGE})
    with scene.routed():
        expected = unlimited.run(unlimited.make_cache())
        cache, stream = scene.make_cache(), Collector(scene.ids)
        if unit == "bytes" and family == "gemma3":  # its sliding layers take less: the same bytes go further
            assert scene.run(cache).tolist() == expected.tolist()
            return
        extra = 0 if unit == "tokens" else 8
        longer = unlimited.extend(unlimited.make_cache(), unlimited.ids, unlimited.new + extra)
        with pytest.raises(CacheFullError):
            scene.extend(cache, scene.ids, scene.new + extra, stream)
        room = 20 if unit == "tokens" else 24
        assert cache.get_seq_length() == room
        assert stream.ids.shape[1] == room + 1
        assert cache.nbytes <= 24 * TOKEN_BYTES[family]
        raise_limit(cache, 4)
        assert scene.extend(cache, stream.ids, scene.new + extra).tolist() == longer.tolist()


@ROUTES
def test_forks_that_no_longer_fit_are_refused_before_anything_is_copied(route: str) -> None:
    """Three rows share the prompt's three pages; their next tokens need two copies of the last one."""
    scene = scene_of("llama", route, 16)
    with scene.routed(), torch.no_grad():
        expected = scene.model(IDS[:, :11]).logits[:, -1:]
        cache = scene.make_cache()
        scene.model(IDS[:, :10], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        was = cache.stats()
        assert was["pages"] == {"total": 4, "used": 3, "shared": 3, "open": 3, "sealed": 0}
        with pytest.raises(CacheFullError) as caught:
            scene.model(IDS[:, 10:11].expand(3, 1), past_key_values=cache)
        assert (caught.value.needed, caught.value.room) == (20, 16)
        assert cache.stats() == was
        raise_limit(cache, 4)
        logits = scene.model(IDS[:, 10:11].expand(3, 1), past_key_values=cache).logits
        torch.testing.assert_close(logits, expected.expand(3, 1, -1), atol=1e-4, rtol=0)
        assert cache.stats()["pages"]["used"] == 5
