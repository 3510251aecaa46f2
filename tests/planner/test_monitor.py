"""The monitor under scripted pressure: which actions, in which order, and never to and fro."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt import ConfigError, CtxoptError
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.watch import Watching, watched
from hf_ctxopt.pages.sealed import SealedPart
from hf_ctxopt.planner import metrics
from hf_ctxopt.planner.actions import drop_prefixes, refuse_new_work, seal_colder, shrink_windows, usual
from hf_ctxopt.planner.meters import bytes_meter, device_meter, fullest, store_meter
from hf_ctxopt.planner.monitor import Action, Event, Monitor
from tests.cli.tiny import tiny_model
from tests.feeding import feed


class Script:
    """A meter that follows a script; actions make room for what comes after them."""

    def __init__(self, uses: Sequence[float], relief: dict[str, float] | None = None) -> None:
        self.uses, self.place, self.freed = list(uses), -1, 0.0
        self.relief = relief or {}
        self.done: list[str] = []

    def __call__(self) -> float:
        return self.uses[max(0, self.place)] - self.freed

    def action(self, name: str, reversible: bool = True, again: bool = False, amount: int = 1) -> Action:
        def act() -> int:
            self.done.append(f"+{name}")
            self.freed += self.relief.get(name, 0.0)
            return amount

        def undo() -> None:
            self.done.append(f"-{name}")

        return Action(name, act, undo if reversible else None, again)

    def play(self, monitor: Monitor) -> list[list[str]]:
        """What was done at each point of the script."""
        found = []
        for place in range(len(self.uses)):
            self.place = place
            before = len(self.done)
            monitor.poll()
            found.append(self.done[before:])
        return found


def test_the_exact_sequence_of_a_rise_and_a_fall() -> None:
    script = Script([0.5, 0.89, 0.91, 0.92, 0.95, 0.99, 0.85, 0.76, 0.74, 0.5])
    actions = [script.action("drop", reversible=False, again=True), script.action("shrink"), script.action("refuse")]
    monitor = Monitor(script, actions)
    assert script.play(monitor) == [
        [], [],
        ["+drop", "+shrink"],  # two for a crossing, though use is still high
        [],  # 0.92 is no new crossing: 0.94 would be
        ["+drop", "+refuse"],  # 0.95 is; what is in force and cannot run again is passed over
        ["+drop"],  # and so is 0.99; nothing else is left
        [], [],  # between the marks nothing happens
        ["-refuse", "-shrink"],  # last first; what cannot be undone is not
        [],
    ]  # fmt: skip
    assert monitor.in_force == ()
    assert monitor.crossings == 3
    assert monitor.stats()["counts"] == {
        "act drop": 3, "act shrink": 1, "act refuse": 1, "undo refuse": 1, "undo shrink": 1,
    }  # fmt: skip


def test_an_action_that_is_enough_is_the_only_one() -> None:
    script = Script([0.95, 0.95, 0.95], {"drop": 0.1})
    monitor = Monitor(script, [script.action("drop", again=True), script.action("shrink")])
    assert script.play(monitor) == [["+drop"], [], []]
    assert monitor.use == pytest.approx(0.85)


def test_no_swinging_around_a_mark() -> None:
    near_high = Script([0.89, 0.91] * 20)
    monitor = Monitor(near_high, [near_high.action("drop", again=True), near_high.action("shrink")])
    near_high.play(monitor)
    assert near_high.done == ["+drop", "+shrink"]
    near_low = Script([0.95, *[0.76, 0.74] * 20])
    monitor = Monitor(near_low, [near_low.action("drop", again=True), near_low.action("shrink")])
    near_low.play(monitor)
    assert near_low.done == ["+drop", "+shrink", "-shrink", "-drop"]


def test_at_most_two_actions_for_a_crossing_whatever_the_script() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        script = Script(torch.rand(60, generator=draw).tolist())
        actions = [script.action(str(i), reversible=i % 2 == 0, again=i == 0) for i in range(5)]
        monitor = Monitor(script, actions)
        for done, use in zip(script.play(monitor), script.uses, strict=True):
            acted = [name for name in done if name[0] == "+"]
            assert len(acted) <= 2
            assert not acted or use > 0.9
            assert all(name[0] == "+" for name in done) or use < 0.75


def test_an_action_with_nothing_to_do_does_not_count() -> None:
    script = Script([0.95])
    actions = [script.action("empty", amount=0), script.action("a"), script.action("b"), script.action("c")]
    monitor = Monitor(script, actions)
    script.play(monitor)
    assert [event.action for event in monitor.events] == ["a", "b"]
    assert monitor.in_force == ("a", "b")


def test_undoing_stops_where_it_fills_memory_again() -> None:
    script = Script([0.95, 0.7, 0.7])
    first, second = script.action("first"), script.action("second")

    def undo() -> None:
        script.done.append("-second")
        script.freed = -0.1  # 0.7 becomes 0.8

    monitor = Monitor(script, [first, Action("second", second.act, undo)])
    assert script.play(monitor)[1] == ["-second"]
    assert monitor.in_force == ("first",)


def test_an_undo_that_raises_is_tried_again_and_no_other_one() -> None:
    script = Script([0.95, 0.7, 0.7, 0.7])
    first, second, third = (script.action(name) for name in ("first", "second", "third"))
    broken = [True]

    def undo() -> None:
        if broken[0]:
            raise ValueError("undo")
        script.done.append("-second")

    monitor = Monitor(script, [first, Action("second", second.act, undo), third], most=3)
    script.place = 0
    monitor.poll()
    script.place = 1
    for _ in range(2):
        with pytest.raises(ValueError, match="undo"):
            monitor.poll()
    assert script.done[3:] == ["-third"]
    assert monitor.in_force == ("first", "second")
    broken[0] = False
    monitor.poll()
    assert script.done[3:] == ["-third", "-second", "-first"]
    assert monitor.counts == {f"{kind} {name}": 1 for kind in ("act", "undo") for name in ("first", "second", "third")}


def test_an_action_that_raises_is_asked_again_at_the_next_crossing() -> None:
    script, asked = Script([0.95, 0.95, 0.96, 0.985]), [0]

    def act() -> int:
        asked[0] += 1
        raise ValueError("act")

    monitor = Monitor(script, [script.action("first"), Action("second", act)])
    for place, raises in enumerate((True, False, False, True)):
        script.place = place
        if raises:
            with pytest.raises(ValueError, match="act"):
                monitor.poll()
        else:
            assert monitor.poll() == []
    assert (monitor.crossings, asked[0]) == (2, 2)
    assert monitor.in_force == ("first",)


def test_events_are_told_logged_and_timed(caplog: pytest.LogCaptureFixture) -> None:
    script, told = Script([0.95]), []
    monitor = Monitor(script, [script.action("drop", amount=7)], callback=told.append, clock=lambda: 12.5)
    with caplog.at_level(logging.WARNING):
        script.play(monitor)
    assert told == monitor.events == [Event("drop", "act", 0.95, 0.95, 7, 12.5)]
    assert "drop" in caplog.text


@pytest.mark.parametrize("marks", [{"low": 0.9, "high": 0.8}, {"high": 1.5}, {"low": 0}, {"step": 0}, {"most": 0}])
def test_bad_marks(marks: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Monitor(lambda: 0.0, [], **marks)  # type: ignore[arg-type]


def test_refused_work_is_accepted_again() -> None:
    script = Script([0.95, 0.5])
    monitor: Monitor = Monitor(script, [refuse_new_work(lambda: monitor)])
    script.place = 0
    monitor.poll()
    assert not monitor.accepting
    script.place = 1
    monitor.poll()
    assert monitor.accepting


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


def test_meters() -> None:
    assert 0 < device_meter("cpu")() < 1
    assert bytes_meter(lambda: 50, 200)() == 0.25
    assert fullest([])() == 0
    with pytest.raises(ConfigError):
        bytes_meter(lambda: 1, 0)
    with pytest.raises(ConfigError):
        device_meter("cuda:99")


def test_metrics() -> None:
    pytest.importorskip("prometheus_client")
    script = Script([0.95])
    monitor = Monitor(script, [script.action("drop")])
    script.play(monitor)
    page = metrics.text(monitor)
    for line in ("ctxopt_memory_use 0.95", "ctxopt_accepting 1.0", "ctxopt_crossings_total 1.0"):
        assert line in page
    assert 'ctxopt_actions_total{action="drop",kind="act"} 1.0' in page


def test_metrics_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(metrics, "import_module", missing)
    with pytest.raises(CtxoptError, match="prometheus-client"):
        metrics.text(Monitor(lambda: 0.0, []))


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


def test_use_at_the_brim_is_answered_at_every_poll() -> None:
    script = Script([0.97, 1.0, 1.0, 1.0, 1.0])
    monitor = Monitor(script, [script.action(name) for name in "abcdefg"])
    assert script.play(monitor) == [["+a", "+b"], ["+c", "+d"], ["+e", "+f"], ["+g"], []]
