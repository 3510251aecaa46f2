"""Plans with a given budget of pages, and the order in which the goals spend quality."""

from __future__ import annotations

from typing import Any

import pytest

from hf_ctxopt.errors import DoesNotFitError
from hf_ctxopt.planner.facts import facts_of
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
