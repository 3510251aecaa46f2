"""The monitor under scripted pressure: which actions, in which order, and never to and fro."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_ctxopt import ConfigError, CtxoptError
from hf_ctxopt.planner import metrics
from hf_ctxopt.planner.actions import refuse_new_work
from hf_ctxopt.planner.meters import bytes_meter, device_meter, fullest
from hf_ctxopt.planner.monitor import Action, Event, Monitor
from tests.planner.script import Script


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


def test_use_at_the_brim_is_answered_at_every_poll() -> None:
    script = Script([0.97, 1.0, 1.0, 1.0, 1.0])
    monitor = Monitor(script, [script.action(name) for name in "abcdefg"])
    assert script.play(monitor) == [["+a", "+b"], ["+c", "+d"], ["+e", "+f"], ["+g"], []]
