"""What a store's user may do besides generating: tight budgets with batches, copies, threads, caches of their own."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.errors import CacheFullError
from hf_ctxopt.integration.compat import cache_in, generate_argument
from tests.families import build
from tests.prefix.rig import STORE, draw, left_padded, reused, same, say, store


def test_what_one_row_brings_back_does_not_spoil_what_another_has_found() -> None:
    """Bringing back the second row's pages pushes out the first row's, which are worth the least."""
    model, one, other = build("llama"), draw(57, 1), draw(57, 2)
    limits = {"budget": 26 * 8, "cpu_budget": "10MiB"}
    for text, worth in ((other, 50), (draw(97, 3), 90), (draw(97, 4), 90), (one, 10)):
        config = {**limits, "priorities": [[0, None, worth]], "decode_priority": worth}
        cache_in(say(model, text, config, max_new_tokens=1)).release()
    rows = left_padded([one + draw(3, 9), other + draw(3, 8)])
    got = say(model, rows, limits)
    assert store().stats()["brought_back_pages"] > 0
    same(got, say(model, rows))


def test_reuse_that_finds_no_room_forgets_no_padding() -> None:
    model = build("llama")
    texts = [draw(60, 1), draw(45, 2)]
    rows = left_padded(texts)
    want = say(model, rows)
    for text in texts:
        say(model, text[:30], {}, max_new_tokens=1)
    import hf_ctxopt.caches.prefix as prefix

    def full(*_: object) -> None:
        raise CacheFullError(1, 0, "no room")

    before, prefix.make_room = prefix.make_room, full
    try:
        got = say(model, rows, {})
    finally:
        prefix.make_room = before
    assert reused(got) == 0
    same(got, want)
    same(say(model, rows, {}), want)


def test_a_cache_that_was_passed_in_is_not_emptied() -> None:
    model, text = build("llama"), torch.tensor([draw(40, 1)])
    cache = hf_ctxopt.make_cache(model, "ctx_prefix", store=STORE, page_size=8)
    model.generate(text, max_new_tokens=8, do_sample=False, **{generate_argument(): cache})
    assert cache.get_seq_length() == 47
    cache.release()
    assert cache.get_seq_length() == 0


def test_a_copy_goes_on_by_itself() -> None:
    model = build("llama")
    out = say(model, draw(70, 1), {})
    cache = cache_in(out)
    twin = copy.deepcopy(cache)
    assert twin.store is cache.store
    assert twin.namespace == cache.namespace
    text = out.sequences[0].tolist() + draw(20, 2)
    for one in (twin, cache):
        same(say(model, text, **{generate_argument(): one}), say(model, text))
        store().check_integrity()
    cache.release()
    assert store().tree.locked_pages > 0  # the copy's
    del cache, out, one, twin
    gc.collect()
    assert store().stats()["locked_pages"] == 0


def test_nothing_grows_with_every_release() -> None:
    model = build("llama")
    cache = hf_ctxopt.make_cache(model, "ctx_prefix", store=STORE, page_size=8)
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(50):
        cache.release()
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]


def test_figures_do_not_wait_for_another_threads_generation_and_pages_do() -> None:
    model = build("llama")
    cache = cache_in(say(model, draw(40, 1), {}))
    held, done = threading.Event(), threading.Event()

    def generating() -> None:
        with store().lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=generating, daemon=True)
    thread.start()
    assert held.wait(60)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(store().stats()["pages"]), daemon=True)
    asking.start()
    asking.join(60)
    assert found
    giving = threading.Thread(target=cache.release, daemon=True)
    giving.start()
    giving.join(0.2)
    assert giving.is_alive()
    assert cache.get_seq_length() > 0
    done.set()
    giving.join(60)
    assert cache.get_seq_length() == 0


def test_a_cache_of_a_layout_that_the_store_has_left_shares_nothing() -> None:
    model, text = build("llama"), draw(60, 2)
    cache = hf_ctxopt.make_cache(model, "ctx_prefix", store=STORE, page_size=8)
    say(build("qwen3"), draw(60, 1), {})  # nobody used the store's pages yet: it takes another model's layout
    for more in ([], draw(20, 3)):
        same(say(model, text + more, **{generate_argument(): cache}), say(model, text + more))
        cache.release()
        store().check_integrity()
    assert cache.stats()["prefix"]["not_reused"]


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_begun_page_does_not_stand_for_the_window_before_it(family: str) -> None:
    """44 tokens are found, and the sliding layers still have what the last of them sees; not what the 40th sees."""
    model, text = build(family), draw(49, 1)
    say(model, text, {}, max_new_tokens=1)
    gc.collect()
    assert store().reclaim(4)
    assert store().stats()["dropped_pages"] >= 4
    other = text[:44] + draw(30, 2)
    same(say(model, other, {}), say(model, other))


def test_pages_of_which_nothing_is_left_go_to_the_host_too() -> None:
    """Where all layers slide, the inner pages of a text are empty."""
    model, config = build("mistral"), {"budget": 8 * 8, "cpu_budget": "1MiB", "offload_priority": 0}
    for seed in range(4):
        say(model, draw(60, seed), config)
        gc.collect()
        store().check_integrity()
    while store().reclaim(1):
        store().check_integrity()
    for seed in range(4):
        same(say(model, draw(60, seed), config), say(model, draw(60, seed)))
        store().check_integrity()
