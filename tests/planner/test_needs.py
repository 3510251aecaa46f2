"""What a plan makes of a prompt's needs: the window, the bits, what it says of them, and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hf_ctxopt import ConfigError, DoesNotFitError, Plan
from hf_ctxopt.planner.needs import ERROR, OUTSIDE, SOUGHT, GroupNeeds, Needs, described
from hf_ctxopt.planner.search import plan
from tests.planner.models import facts

WINDOWS = (256, 384, 512, 768, 1024)
FINE = (0.003, 0.03, 0.2)


GOALS = ("quality", "context", "speed")


def needs(sought: tuple[float, ...] | None = None, **changes: Any) -> Needs:
    """Of a prompt of 2,000 tokens, for a model of 32 full layers; nothing is sought by default."""
    group = GroupNeeds(
        layers=32, window=None, text=(0.1,) * 5, answer=(0.1,) * 5, sought=sought or (0.0,) * 5, key_errors=FINE,
        value_errors=FINE,
    )  # fmt: skip
    return Needs(tokens=2000, queries=32, sinks=4, windows=WINDOWS, groups=(replace(group, **changes),))


SUMMARY, CODE, NEEDLE = needs(), needs((0.03, 0.02, 0.01, 0.01, 0.0)), needs((0.03,) * 5)


def test_the_shortest_window_that_keeps_what_is_sought() -> None:
    assert (SUMMARY.window, CODE.window, NEEDLE.window) == (256, 512, None)
    assert needs((SOUGHT,) * 5).window == 256
    assert needs((SOUGHT * 1.01,) * 5).window is None
    assert needs(answer=(OUTSIDE * 1.01, OUTSIDE, 0.1, 0.1, 0.1)).window == 384
    assert CODE.outside(384) == (pytest.approx(0.1), pytest.approx(0.02))
    assert [CODE.holds(window) for window in (256, 511, 512, 600, 4096)] == [False, False, True, True, True]
    assert [NEEDLE.holds(window) for window in (1024, 1995, 1996)] == [False, False, True]  # 4 sinks and all the rest


def test_only_layers_that_a_window_cuts_count() -> None:
    """Sliding layers keep their own window beside full ones; where every layer slides, all are cut."""
    sliding = replace(NEEDLE.groups[0], window=1024, layers=160)
    assert replace(SUMMARY, groups=(*SUMMARY.groups, sliding)).window == 256
    assert replace(SUMMARY, groups=(sliding,)).window is None
    full, other = SUMMARY.groups[0], NEEDLE.groups[0]
    mixed = replace(SUMMARY, groups=(replace(full, layers=24), replace(other, layers=8)))
    assert mixed.outside(256)[1] == pytest.approx(0.03 * 8 / 32)


def test_no_window_where_the_whole_text_fits_beside_the_best() -> None:
    """Windows are spent last: with room for everything only speed asks for one."""
    roomy = {goal: plan(facts("Llama-3.1-8B"), vram="80GiB", goal=goal, probe=SUMMARY) for goal in GOALS}
    assert {goal: found.window for goal, found in roomy.items()} == {"quality": None, "context": None, "speed": 256}
    assert any("no window is needed" in reason for reason in roomy["quality"].reasons)


def test_three_tasks_get_three_settings_on_one_card() -> None:
    """8 GiB, 16 k tokens: a window's memory goes to better weights, and the needle's text is kept whole."""
    found = {
        name: plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384, probe=need)
        for name, need in (("summary", SUMMARY), ("code", CODE), ("needle", NEEDLE))
    }
    assert [(got.cache, got.window) for got in found.values()] == [
        ("ctx_sink", 256), ("ctx_sink", 512), ("ctx_paged", None),
    ]  # fmt: skip
    usual = plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384)
    assert (found["needle"].weights, found["needle"].kv_bits) == (usual.weights, usual.kv_bits)
    assert found["summary"].weights == "Q6_K"
    for got, need in zip(found.values(), (SUMMARY, CODE, NEEDLE), strict=True):
        assert got.needs == need
        assert set(described(need)) <= set(got.reasons)
        assert got.total_bytes <= got.vram
        assert Plan.from_dict(json.loads(json.dumps(got.to_dict()))) == got


def test_bits_that_change_too_much_are_not_tried() -> None:
    coarse = needs((0.03,) * 5, key_errors=(0.003, ERROR, 0.5))
    assert coarse.error(4, 4) > ERROR >= coarse.error(4, 16)
    wanted: dict[str, Any] = {"vram": "8GiB", "context": 32768}
    usual = plan(facts("Llama-3.1-8B"), **wanted)
    assert usual.kv_bits == {"k": 8, "v": 4}
    finer = plan(facts("Llama-3.1-8B"), **wanted, probe=needs((0.03,) * 5))
    assert finer.kv_bits == usual.kv_bits  # fewest bits are no aim: memory forces them, in the usual order
    hosted = plan(facts("Llama-3.1-8B"), **wanted, probe=needs((0.03,) * 5, value_errors=(0.003, 0.2, 0.5)))
    assert (hosted.kv_bits, hosted.on_host) == ({"k": 8, "v": 8}, ("embedding",))
    larger = plan(facts("Llama-3.1-8B"), vram="24GiB", probe=coarse)
    assert any("4-bit pages, 2-bit pages" in reason for reason in larger.reasons)
    asked = plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384, kv_bits=2, probe=coarse)
    assert asked.kv_bits == {"k": 2, "v": 2}
    assert any("asked for" in reason for reason in asked.reasons)


def test_no_window_that_loses_what_is_needed() -> None:
    """131,072 tokens do not fit 8 GiB: without a prompt a window comes last, and here it would lose the needle."""
    assert plan(facts("Llama-3.1-8B"), vram="8GiB", context=131072).window is not None
    short = replace(NEEDLE, tokens=100_000)
    with pytest.raises(DoesNotFitError, match="loses what the prompt needs"):
        plan(facts("Llama-3.1-8B"), vram="8GiB", context=131072, probe=short)


def test_beyond_the_trained_length() -> None:
    found = plan(facts("Llama-2-7B"), vram="8GiB", context=16384, probe=CODE)
    assert (found.cache, found.window) == ("ctx_sink", 512)
    found = plan(facts("Llama-2-7B"), vram="12GiB", context=16384, probe=NEEDLE)
    assert found.window == 4092
    assert any("far tokens" in reason and "lost" in reason for reason in found.reasons)


def test_where_no_window_can_be() -> None:
    """Several agents share whole texts, and learned positions forbid it."""
    assert plan(facts("Llama-3.1-8B"), vram="24GiB", agents=2, probe=SUMMARY).cache == "ctx_prefix"
    gpt2 = {"model_type": "gpt2", "n_positions": 2048}
    assert plan(gpt2, vram="8GiB", probe=SUMMARY).window is None


def test_context_of_a_long_prompt() -> None:
    long = replace(NEEDLE, tokens=20_000)
    assert plan(facts("Llama-3.1-8B"), vram="24GiB", probe=long).context == 20_000
    with pytest.raises(ConfigError) as refused:
        plan(facts("Llama-3.1-8B"), vram="24GiB", context=16384, probe=long)
    assert refused.value.field == "context"


def test_json_of_needs() -> None:
    values = json.loads(json.dumps(CODE.to_dict()))
    assert Needs.from_dict(values) == CODE
    assert plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384, probe=values).window == 512
    row = values["groups"][0]
    for broken in (
        {}, {**values, "colour": 1}, {**values, "groups": []}, {**values, "groups": [{**row, "sought": [0.1]}]},
        {**values, "groups": [{**row, "key_errors": [0.1]}]}, {**values, "groups": [{"layers": 1}]},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Needs.from_dict(broken)
    with pytest.raises(ConfigError) as refused:
        plan(facts("Llama-3.1-8B"), vram="8GiB", probe=3.5)
    assert refused.value.field == "probe"
    old = plan(facts("Llama-3.1-8B"), vram="8GiB").to_dict()
    del old["needs"]  # a plan of before there were needs
    assert Plan.from_dict(old).needs is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "x"), ("tokens", None), ("queries", True), ("sinks", [4]), ("windows", None), ("windows", ["x"]),
        ("groups", 3), ("groups", None), ("groups", [1]), ("tokens", 0), ("sinks", -1), ("windows", [512, 256]),
        ("windows", [0]),
    ],
)  # fmt: skip
def test_needs_of_other_types_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        Needs.from_dict({**SUMMARY.to_dict(), field: value})
    assert refused.value.field == f"needs.{field}"
    row = SUMMARY.to_dict()["groups"][0]
    for name, bad in (
        ("layers", "x"),
        ("window", 1.5),
        ("text", None),
        ("answer", ["x"] * len(SUMMARY.windows)),
        ("layers", 0),
        ("sought", [float("inf")] * len(SUMMARY.windows)),
        ("key_errors", [float("nan")] * 3),
        ("value_errors", [-0.1] * 3),
    ):
        with pytest.raises(ConfigError) as refused:
            Needs.from_dict({**SUMMARY.to_dict(), "groups": [{**row, name: bad}]})
        assert refused.value.field == f"needs.{name}"
