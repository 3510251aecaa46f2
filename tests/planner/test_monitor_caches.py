"""A monitor's actions on real caches and stores."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.watch import Watching, watched
from hf_ctxopt.pages.sealed import SealedPart
from hf_ctxopt.planner.actions import drop_prefixes, seal_colder, shrink_windows, usual
from hf_ctxopt.planner.meters import bytes_meter, fullest, store_meter
from hf_ctxopt.planner.monitor import Monitor
from tests.cli.tiny import tiny_model
from tests.feeding import feed
from tests.planner.script import Script


def test_kept_prefixes_go_by_age_and_what_is_in_use_stays() -> None:
    model = tiny_model()
    ids = torch.randint(2, 258, (3, 64), generator=torch.Generator().manual_seed(1))
    config = {"store": "monitored", "page_size": 8, "budget": "1MiB"}
    try:
        for row in ids:
            model.generate(
                row[None], attention_mask=torch.ones(1, 64), max_new_tokens=2, do_sample=False,
                cache_implementation="ctx_prefix", cache_config=config,
            )  # fmt: skip
        store = hf_ctxopt.stores()["monitored"]
        before, size = store.stats()["pages"], store.nbytes
        use = store_meter(store)
        assert 0 < use() < 1
        monitor = Monitor(fullest([lambda: 0.95, use]), [drop_prefixes(lambda: [store])], most=1)
        monitor.poll()
        assert store.stats()["pages"] == before - before // 4
        assert monitor.events[0].amount == size - store.nbytes >= size // 4
        store.check_integrity()
    finally:
        hf_ctxopt.drop_store("monitored")


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("bits", [16, 8])
def test_windows_shrink_give_memory_back_and_grow_again(route: str, bits: int) -> None:
    model = tiny_model()
    if route == "fused":
        hf_ctxopt.patch_model(model, "ctx_sink")
    cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=4, window=128, page_size=8, kv_bits=bits)
    ids = torch.randint(2, 258, (1, 400), generator=torch.Generator().manual_seed(2))
    feed(model, ids[:, :200], cache, chunk=20)
    before, budget = cache.nbytes, int(cache.nbytes / 0.95)
    monitor = Monitor(bytes_meter(lambda: cache.nbytes, budget), [shrink_windows(lambda: [cache], least=32)])
    monitor.poll()
    assert monitor.in_force == ("shrink_windows",)
    logits = feed(model, ids[:, 200:220], cache, chunk=1)
    assert torch.isfinite(logits).all()
    assert cache.stats()["tokens_held"] <= 4 + 32 + 2 * 8
    assert cache.nbytes < before / 2
    cache.check_integrity()
    monitor.poll()  # under the low mark: the window may be as wide as before
    assert monitor.in_force == ()
    assert cache.groups[0].policy.window == 128
    feed(model, ids[:, 220:300], cache, chunk=1)
    held = cache.stats()["tokens_held"]
    assert 4 + 32 + 80 - 16 <= held <= 4 + 128 + 16
    feed(model, ids[:, 300:], cache, chunk=20)
    cache.check_integrity()
    assert cache.stats()["tokens_held"] >= 4 + 128 - 8


def test_a_shrunk_window_sees_what_a_small_one_sees() -> None:
    """Behind the shrinking no token but the sinks and the last 16 has any influence."""
    model = tiny_model()
    hf_ctxopt.patch_model(model, "ctx_sink")
    ids = torch.randint(2, 258, (1, 120), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, 40] = (other[:, 40] + 7) % 258

    def run(text: torch.Tensor, shrink: bool) -> torch.Tensor:
        cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=4, window=100, page_size=8)
        feed(model, text[:, :50], cache, chunk=10)
        if shrink:
            shrink_windows(lambda: [cache], least=16).act()
        return feed(model, text[:, 50:], cache, chunk=1)

    # Two layers pass on what was seen before the shrinking for two windows; after that it is gone.
    assert torch.equal(run(ids, True)[:, -20:], run(other, True)[:, -20:])
    assert not torch.equal(run(ids, False)[:, -20:], run(other, False)[:, -20:])


def test_a_monitor_between_the_steps_of_generate() -> None:
    model = tiny_model()
    cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=4, window=128, page_size=8)
    ids = torch.randint(2, 258, (1, 100), generator=torch.Generator().manual_seed(4))
    times = iter(range(1000))
    monitor = Monitor(
        lambda: 0.95 if cache.get_seq_length() > 110 else 0.8, [shrink_windows(lambda: [cache], least=32)]
    )  # fmt: skip
    watching = Watching(monitor, every=2, clock=lambda: next(times))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None,
        stopping_criteria=[watching], **{generate_argument(): cache},
    )  # fmt: skip
    assert out.shape[1] == 140
    assert monitor.counts == {"act shrink_windows": 1}
    assert cache.stats()["tokens_held"] <= 4 + 32 + 16


def test_shrunk_caches_are_not_kept_alive() -> None:
    model = tiny_model()
    caches = [hf_ctxopt.make_cache(model, "ctx_sink", window=100)]
    action = shrink_windows(lambda: caches, least=16)
    assert action.act() == 1
    group = weakref.ref(caches[0].groups[0])
    caches.clear()
    gc.collect()
    assert group() is None
    assert action.undo is not None
    action.undo()


def test_the_usual_actions_run_in_their_order_and_are_taken_back() -> None:
    """Real caches and a real store; the meter is a script, so what each poll does is known in advance."""
    model = tiny_model()
    draw = torch.Generator().manual_seed(6)
    ids = torch.randint(2, 258, (1, 400), generator=draw)
    paged = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
    sink = hf_ctxopt.make_cache(model, "ctx_sink", sinks=4, window=300, page_size=8, kv_bits=8)
    for cache in (paged, sink):
        feed(model, ids, cache, chunk=100)
    try:
        for row in torch.randint(2, 258, (4, 64), generator=draw):
            model.generate(
                row[None], attention_mask=torch.ones(1, 64), max_new_tokens=2, do_sample=False,
                cache_implementation="ctx_prefix", cache_config={"store": "usual", "page_size": 8},
            )  # fmt: skip
        store, sizes = hf_ctxopt.stores()["usual"], [paged.nbytes]
        size = store.nbytes
        script = Script([0.5, 0.91, 0.92, 0.95, 0.99, 1.0, 0.8, 0.7, 0.5])
        monitor: Monitor = Monitor(script, usual(lambda: [paged, sink], lambda: [store], lambda: monitor))
        found = []
        for place in range(len(script.uses)):
            script.place = place
            found.append([(event.kind, event.action) for event in monitor.poll()])
            sizes.append(paged.nbytes)
        assert found == [
            [],
            [("act", "drop_prefixes"), ("act", "seal_colder")],  # 16 to 8 bits, where they are not there yet
            [],
            [("act", "drop_prefixes"), ("act", "seal_colder")],  # to 4
            [("act", "drop_prefixes"), ("act", "shrink_windows")],  # there are no fewer bits
            [("act", "drop_prefixes"), ("act", "refuse_new_work")],
            [],
            [("undo", "refuse_new_work"), ("undo", "shrink_windows")],  # the others cannot be undone
            [],
        ]
        assert sizes[1] > 2 * sizes[2] == 2 * sizes[3] > 2.5 * sizes[4]
        assert store.stats()["pages"] == 32 - 8 - 6 - 4 - 3
        assert sum(event.amount for event in monitor.events if event.action == "drop_prefixes") == size - store.nbytes
        assert monitor.stats()["counts"]["act seal_colder"] == 2
        assert monitor.events[1].amount == sizes[1] - sizes[2]  # the other cache has no more than 8 bits
        assert paged.stats()["kv_bits"] == sink.stats()["kv_bits"] == {"k": 4, "v": 4}
        assert sink.groups[0].policy.window == 300
        assert monitor.accepting
        for cache in (paged, sink):
            assert torch.isfinite(feed(model, ids[:, :30], cache, chunk=10)).all()
            cache.check_integrity()
    finally:
        hf_ctxopt.drop_store("usual")


def test_a_meter_of_the_caches_bytes_falls_when_pages_are_sealed() -> None:
    """No script: the bytes that are really held cross the mark, and fewer bits bring them under it."""
    model, ids = tiny_model(), torch.randint(2, 258, (1, 1300), generator=torch.Generator().manual_seed(8))
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
    feed(model, ids[:, :300], cache, chunk=50)
    monitor = Monitor(bytes_meter(lambda: cache.nbytes, int(cache.nbytes * 1.05)), [seal_colder(lambda: [cache])])
    uses = []
    with watched(model, monitor, every=0):
        for start in range(300, 1300, 50):
            feed(model, ids[:, start : start + 50], cache, chunk=50)
            uses.append(monitor.use)
    assert monitor.counts == {"act seal_colder": 2}
    assert [event.before > 0.9 > event.after for event in monitor.events] == [True, True]
    assert max(uses) < 1.1
    cache.check_integrity()


def test_what_cannot_be_sealed_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    ids = torch.randint(2, 258, (1, 60), generator=torch.Generator().manual_seed(9))
    mixed = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, kv_bits={"k": 16, "v": 4})
    feed(model, ids, mixed, chunk=20)
    action = seal_colder(lambda: [mixed])
    assert action.act() > 0
    assert mixed.options.kv_bits == {"k": 8, "v": 4}
    assert action.act() > 0
    assert mixed.options.kv_bits == 4
    assert action.act() == 0
    try:
        with (
            hf_ctxopt.patched(model, cache="ctx_prefix", store="passed", page_size=8),
            caplog.at_level(logging.WARNING),
        ):
            out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
            assert seal_colder(lambda: [out[generate_argument()]]).act() == 0
        assert "prefix store" in caplog.text
    finally:
        hf_ctxopt.drop_store("passed")
    for steps in ((4, 8), (16, 8), (8, 8), (3,)):
        with pytest.raises(ConfigError, match="steps"):
            seal_colder(lambda: [], steps)


def test_a_failed_seal_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the new pages: the action says how much it has done, and the next crossing goes on."""
    model, ids = tiny_model(), torch.randint(2, 258, (1, 200), generator=torch.Generator().manual_seed(9))
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
    feed(model, ids, cache, chunk=50)
    recoded, count = SealedPart.recoded, [0]

    def failing(part: SealedPart, *args: Any) -> SealedPart:
        count[0] += 1
        if count[0] == 2:
            raise torch.OutOfMemoryError("no room")
        return recoded(part, *args)

    monkeypatch.setattr(SealedPart, "recoded", failing)
    script = Script([0.91, 0.92, 0.95, 0.98])
    monitor = Monitor(script, [seal_colder(lambda: [cache])])
    script.play(monitor)
    assert monitor.counts == {"act seal_colder": 2}
    assert cache.stats()["kv_bits"] == {"k": 8, "v": 8}
    assert all(event.amount > 0 for event in monitor.events)
    cache.check_integrity()


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_a_watched_model_is_polled_between_chunks(route: str) -> None:
    model = tiny_model()
    if route == "fused":
        hf_ctxopt.patch_model(model, "ctx_paged")
    ids = torch.randint(2, 258, (1, 200), generator=torch.Generator().manual_seed(4))
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
    seen: list[int] = []

    def meter() -> float:
        seen.append(cache.get_seq_length())
        return 0.95 if cache.get_seq_length() == 100 else 0.8

    monitor = Monitor(meter, [seal_colder(lambda: [cache])])
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with watched(model, monitor, every=0) as watching:
        model.generate(ids, prefill_chunk_size=50, **call, **{generate_argument(): cache})
    assert sorted(set(seen)) == [0, 50, 100, 150, 200, 201, 202]
    assert monitor.counts == {"act seal_colder": 1}
    assert watching.monitor is monitor
    assert cache.stats()["kv_bits"] == {"k": 8, "v": 8}
    assert not model._forward_pre_hooks or route == "fused"
    cache.check_integrity()
