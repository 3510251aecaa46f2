"""Plans with a given budget of pages, and the order in which the goals spend quality."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hf_ctxopt.errors import ConfigError, DoesNotFitError
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.plan import Plan
from hf_ctxopt.planner.schemes import weight_bytes
from hf_ctxopt.planner.search import plan
from tests.planner.models import facts

LLAMA = "Llama-3.1-8B"


def test_fewer_tokens_where_none_were_asked_for() -> None:
    found = plan(facts(LLAMA), vram="80GiB", kv_budget="512MiB", kv_bits=16)
    assert (found.weights, found.context) == ("bf16", 4096)  # 128 KiB a token
    assert found.pages * found.page_bytes <= 512 << 20 < (found.pages + 1) * found.page_bytes


@pytest.mark.parametrize("budget", ["256MiB", "512MiB"])
def test_weights_are_not_packed_for_a_budget_that_packing_does_not_help(budget: str) -> None:
    tight = plan(facts(LLAMA), vram="24GiB", kv_budget=budget, context=16384)
    asked = plan(facts(LLAMA), vram="24GiB", kv_budget=budget, context=16384, weights="bf16")
    assert (tight.weights, tight.kv_bits, tight.window) == (asked.weights, asked.kv_bits, asked.window)
    assert plan(facts(LLAMA), vram="8GiB", kv_budget=budget).weights == "Q5_K_M"  # the best that leave it


def test_a_budget_that_is_too_small_is_what_the_refusal_names() -> None:
    with pytest.raises(DoesNotFitError, match="16 MiB of kv_budget") as caught:
        plan(facts(LLAMA), vram="24GiB", kv_budget="16MiB")
    assert "card" not in str(caught.value)
    assert any("kv_budget of" in remedy for remedy in caught.value.remedies)


def test_a_budget_beside_weights_that_leave_less() -> None:
    with pytest.raises(DoesNotFitError, match=r"pages of 1\.\d+ GiB would fit"):
        plan(facts(LLAMA), vram="8GiB", kv_budget="6GiB")


def test_only_speed_takes_two_bits_before_the_host() -> None:
    found = {
        goal: plan(facts(LLAMA), vram="8GiB", context=60000, goal=goal) for goal in ("quality", "context", "speed")
    }
    assert [(got.kv_bits["k"], bool(got.on_host)) for got in found.values()] == [(4, True), (4, True), (2, False)]


def test_shared_experts_are_read_for_every_token() -> None:
    shape: dict[str, Any] = {
        "model_type": "qwen2_moe", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 512,
    }  # fmt: skip
    found = facts_of(shape)
    read = weight_bytes(found, "bf16").read
    without = weight_bytes(facts_of({**shape, "shared_expert_intermediate_size": 256}), "bf16").read
    assert read - without == 2 * 2 * 3 * 256 * 256


def test_a_budget_with_fewer_tokens_than_usual_fits_the_card() -> None:
    for mib in range(6500, 8400, 75):  # chunks of 512 tokens fit some of these only without the budget
        found = plan(facts(LLAMA), vram=mib << 20, kv_budget="200MiB")
        assert found.total_bytes <= found.vram


@pytest.mark.parametrize(("vram", "budget"), [("24GiB", "449MiB"), ("8GiB", "6GiB")])
def test_remedies_of_a_budget_are_true(vram: str, budget: str) -> None:
    asked: dict[str, Any] = {"context": 8192, "batch": 8, "agents": 64, "kv_bits": 8}
    with pytest.raises(DoesNotFitError) as refused:
        plan(facts(LLAMA), vram=vram, kv_budget=budget, **asked)
    remedy = refused.value.remedies[0]
    size, card = re.match(r"a kv_budget of ([\d.]+ GiB) on a card of (\d+) GiB would do", remedy).groups()  # type: ignore[union-attr]
    assert plan(facts(LLAMA), vram=f"{card}GiB", kv_budget=size, **asked).agents == 64


def test_a_card_with_the_shortfall_more_does() -> None:
    asked: dict[str, Any] = {"context": 40000, "agents": 4, "reserve": 0, "weights": "Q4_K_M", "kv_bits": 8}
    with pytest.raises(DoesNotFitError) as refused:
        plan(facts("Qwen3-8B"), vram="8GiB", **asked)
    short = refused.value.shortfall
    assert plan(facts("Qwen3-8B"), vram=(8 << 30) + short, **asked).context == 40000


def test_speed_counts_where_a_window_is_needed_too() -> None:
    found = {goal: plan(facts("Llama-2-7B"), vram="24GiB", context=16384, goal=goal) for goal in ("quality", "speed")}
    assert (found["quality"].weights, found["speed"].weights) == ("bf16", "Q4_K_M")
    assert found["quality"].window == found["speed"].window == 4092
    assert 2 * (found["speed"].ms_per_token or 0) < (found["quality"].ms_per_token or 0)


def test_an_absurd_batch_is_refused_at_once() -> None:
    with pytest.raises(DoesNotFitError, match="a card of"):
        plan(facts(LLAMA), vram="8GiB", batch=10**15)


@pytest.mark.parametrize(
    ("field", "value"), [("pages", 5), ("page_budget", 1 << 40), ("kv_budget", 1), ("capacity", 1), ("vram", 1000)]
)
def test_numbers_that_contradict_each_other_are_refused(field: str, value: int) -> None:
    given = plan(facts(LLAMA), vram="24GiB").to_dict()
    assert Plan.from_dict(given).to_dict() == given
    with pytest.raises(ConfigError, match=r"plan\."):
        Plan.from_dict({**given, field: value})
