"""Plans of six models on four cards for three goals, against arithmetic of the test's own."""

from __future__ import annotations

import json
from itertools import product

import pytest

from hf_ctxopt import ConfigError, DoesNotFitError, Plan, plan
from hf_ctxopt.planner.ladder import Rung, ladder
from hf_ctxopt.planner.schemes import weight_bytes
from tests.planner.models import GIB, KNOWN, facts

CARDS = (8, 12, 16, 24)
GOALS = ("quality", "context", "speed")
ORDER = [(weights, bits) for weights in ("bf16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M") for bits in (16, 8)]
"""The stated order, as far as 8-bit pages."""
# Weights and bits of K and V at 8,192 tokens (Llama-2: 4,096), goal "quality"; h: embedding and head on the host.
# By hand, e.g. 8 GiB and Llama-3.1-8B: 8 - 1 (reserve) - 0.45 (context) - 0.125 (graph) - 0.08 (chunks of 256) =
# 6.345 GiB are left; Q5_K_M is 5.33 and its pages 1.0 at 16 bits; Q6_K is 6.13 and its pages 0.56 at 8.
PICKED = {
    ("Llama-2-7B", 8): ("Q6_K", 8, 8, ""), ("Llama-2-7B", 12): ("Q8_0", 16, 16, ""),
    ("Llama-2-7B", 16): ("Q8_0", 16, 16, ""), ("Llama-2-7B", 24): ("bf16", 16, 16, ""),
    ("Llama-3.1-8B", 8): ("Q5_K_M", 16, 16, ""), ("Llama-3.1-8B", 12): ("Q8_0", 16, 16, ""),
    ("Llama-3.1-8B", 16): ("Q8_0", 16, 16, ""), ("Llama-3.1-8B", 24): ("bf16", 16, 16, ""),
    ("Mistral-7B", 8): ("Q6_K", 8, 8, ""), ("Mistral-7B", 12): ("Q8_0", 16, 16, ""),
    ("Mistral-7B", 16): ("Q8_0", 16, 16, ""), ("Mistral-7B", 24): ("bf16", 16, 16, ""),
    ("Qwen3-8B", 8): ("Q5_K_M", 8, 8, ""), ("Qwen3-8B", 12): ("Q8_0", 16, 16, ""),
    ("Qwen3-8B", 16): ("Q8_0", 16, 16, ""), ("Qwen3-8B", 24): ("bf16", 16, 16, ""),
    ("Gemma-3-12B", 8): ("Q4_K_M", 8, 8, "h"), ("Gemma-3-12B", 12): ("Q6_K", 16, 16, ""),
    ("Gemma-3-12B", 16): ("Q8_0", 16, 16, ""), ("Gemma-3-12B", 24): ("Q8_0", 16, 16, ""),
    ("Phi-4-mini", 8): ("Q8_0", 16, 16, ""), ("Phi-4-mini", 12): ("bf16", 16, 16, ""),
    ("Phi-4-mini", 16): ("bf16", 16, 16, ""), ("Phi-4-mini", 24): ("bf16", 16, 16, ""),
}  # fmt: skip


def _weights(name: str, scheme: str) -> float:
    known = KNOWN[name]
    return 2 * known.parameters if scheme == "bf16" else 1e9 * known.gguf[scheme]


def _pages(name: str, bits: int, tokens: int) -> float:
    """Bytes of K and V: bf16, or 9/16 of that and two open pages; Gemma's sliding layers beside them."""
    known = KNOWN[name]
    size = known.token_bytes * tokens if bits == 16 else known.page_bytes * (tokens / 32 - 1) + 64 * known.token_bytes
    if name != "Gemma-3-12B":
        return size
    sliding = 33 * (32 * 5 * known.token_bytes if bits == 16 else 5 * known.page_bytes)
    return size + sliding + (0 if bits == 16 else 32 * 5 * known.token_bytes)


@pytest.mark.parametrize(("name", "card", "goal"), list(product(KNOWN, CARDS, GOALS)))
def test_bytes_add_up_and_fit(name: str, card: int, goal: str) -> None:
    found = plan(facts(name), vram=f"{card}GiB", goal=goal)
    known, parts = KNOWN[name], found.bytes
    assert found.total_bytes == sum(parts.values()) <= found.vram == card * GIB
    assert all(count >= 0 for count in parts.values())
    assert found.pages * found.page_bytes <= found.page_budget < (found.pages + 1) * found.page_bytes
    assert parts["kv"] <= found.kv_budget
    assert parts["reserve"] == (GIB if card == 8 else card * GIB * 12 // 100)
    assert found.window is None
    assert found.capacity is not None
    assert found.context <= found.capacity <= known.trained
    on_card = parts["weights"] + parts["embeddings"]
    whole = weight_bytes(facts(name), found.weights)
    gone = whole.embedding + whole.head if len(found.on_host) == 2 else 0
    assert on_card + gone == whole.total == pytest.approx(_weights(name, found.weights), rel=0.02)
    if found.kv_bits["k"] == found.kv_bits["v"] >= 8:
        bits = found.kv_bits["k"]
        assert parts["kv"] == pytest.approx(_pages(name, bits, found.context), rel=0.01)
        assert found.page_bytes == (known.page_bytes if bits == 8 else 32 * known.token_bytes)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(("name", "card"), list(PICKED))
def test_quality_is_spent_in_order(name: str, card: int) -> None:
    found = plan(facts(name), vram=f"{card}GiB")
    on_host = "h" if found.on_host else ""
    assert (found.weights, found.kv_bits["k"], found.kv_bits["v"], on_host) == PICKED[name, card]
    if on_host:
        return
    reserve = GIB if card == 8 else 0.12 * card * GIB
    least = reserve + 0.45 * GIB + 0.125 * GIB  # the prompt's activations, 0.03 to 0.3 GiB, are left out
    place = ORDER.index((found.weights, found.kv_bits["k"]))
    for weights, bits in ORDER[:place]:  # nothing better would have fitted
        wanted = _weights(name, weights) + _pages(name, bits, found.context) + least
        assert wanted > 0.97 * card * GIB, (weights, bits)
    assert f"rejected: {ORDER[0][0]}" in "\n".join(found.reasons) or place < 2


@pytest.mark.parametrize(("name", "card"), list(product(KNOWN, CARDS)))
def test_what_the_goals_are_for(name: str, card: int) -> None:
    quality, context, speed = (plan(facts(name), vram=card * GIB, goal=goal) for goal in GOALS)
    assert context.context >= quality.context
    assert speed.ms_per_token is not None
    assert quality.ms_per_token is not None
    assert speed.ms_per_token <= quality.ms_per_token * 1.001
    assert min(speed.kv_bits.values()) >= 4


def test_llama3_with_16k_on_8_gb_keeps_the_whole_text() -> None:
    found = plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384)
    assert found.weights == "Q4_K_M"
    assert found.kv_bits["k"] <= 8
    assert (found.cache, found.window, found.context) == ("ctx_paged", None, 16384)
    # 512 pages, of which the first and the begun one are open: 511 x 2,260,992 + 2 x 4,194,304 bytes.
    assert found.bytes["kv"] == 511 * 2_260_992 + 2 * 4_194_304


def test_llama2_beyond_its_training_gets_a_sink_window_and_is_told() -> None:
    found = plan(facts("Llama-2-7B"), vram="8GiB", context=16384)
    assert found.cache == "ctx_sink"
    assert found.window is not None
    assert found.sinks is not None
    assert found.sinks + found.window <= 4096
    assert found.capacity is None
    assert found.quality.endswith("windowed")
    assert any("16,384" in reason and "4,096" in reason and "window" in reason for reason in found.reasons)
    assert found.cache_options == {
        "page_size": 32, "kv_bits": dict(found.kv_bits), "window": found.window, "sinks": found.sinks,
    }  # fmt: skip


def test_a_budget_of_6_gib_beside_a_model_of_3_8_on_8_is_refused() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        plan(facts("Llama-2-7B"), vram="8GiB", kv_budget="6GiB")
    model = _weights("Llama-2-7B", "Q4_K_M")
    fixed = model + 6 * GIB + GIB + 0.45 * GIB + 0.125 * GIB - 8 * GIB
    assert fixed < refused.value.shortfall < fixed + 0.3 * GIB
    assert f"{refused.value.shortfall:,} bytes" in str(refused.value)
    assert "would fit" in str(refused.value)
    assert "12 GiB" in str(refused.value)


def test_a_budget_that_fits_is_what_the_pages_get() -> None:
    found = plan(facts("Llama-2-7B"), vram="8GiB", kv_budget="2GiB")
    assert found.kv_budget == found.bytes["kv"] == 2 * GIB
    assert found.pages * found.page_bytes <= found.page_budget < (found.pages + 1) * found.page_bytes


def test_gemma_on_8_gb_counts_its_embeddings() -> None:
    found = plan(facts("Gemma-3-12B"), vram="8GiB")
    matrix = 262208 * 3840
    assert found.on_host == ("embedding", "head")
    assert found.host_bytes == 2 * matrix
    assert found.bytes["embeddings"] == 0
    assert any("embedding" in reason for reason in found.reasons)
    larger = plan(facts("Gemma-3-12B"), vram="12GiB", weights="Q4_K_M")
    assert larger.on_host == ()
    assert larger.bytes["embeddings"] == matrix * 210 // 256  # Q6_K, once: head and embedding are one matrix
    with pytest.raises(DoesNotFitError, match="would"):
        plan(facts("Gemma-3-12B"), vram="6GiB")


def test_where_nothing_holds_the_text_a_window_comes_last() -> None:
    found = plan(facts("Llama-3.1-8B"), vram="8GiB", context=131072)
    assert found.cache == "ctx_sink"
    assert found.window is not None
    assert 1024 <= found.window < 131072
    assert any("2-bit" in reason for reason in found.reasons)  # all of the ladder was tried before
    assert found.total_bytes <= 8 * GIB
    assert plan(facts("Llama-3.1-8B"), vram="8GiB", context=65536).window is None


def test_agents_share_a_store_that_holds_all_of_them() -> None:
    one = plan(facts("Llama-3.1-8B"), vram="12GiB", weights="Q4_K_M", kv_bits=8)
    four = plan(facts("Llama-3.1-8B"), vram="12GiB", weights="Q4_K_M", kv_bits=8, agents=4)
    assert four.cache == "ctx_prefix"
    assert four.cache_options["store"] == "sessions"
    assert four.bytes["kv"] == 4 * one.bytes["kv"]
    with pytest.raises(ConfigError, match="prefix store"):
        plan(facts("Llama-2-7B"), vram="12GiB", context=8192, agents=2)


def test_batch() -> None:
    one = plan(facts("Phi-4-mini"), vram="12GiB", weights="Q8_0", kv_bits=16, context=4096)
    eight = plan(facts("Phi-4-mini"), vram="12GiB", weights="Q8_0", kv_bits=16, context=4096, batch=8)
    assert eight.bytes["kv"] == 8 * one.bytes["kv"]
    assert eight.capacity is not None
    assert one.capacity is not None
    assert eight.capacity < one.capacity


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("model", sorted(KNOWN))
def test_a_larger_card_never_gets_fewer_tokens(model: str, goal: str) -> None:
    before = 0
    for vram in range(3 * GIB, 21 * GIB, 357 << 20):
        try:
            found = plan(facts(model), vram=vram, goal=goal)
        except DoesNotFitError:
            assert not before
            continue
        assert found.context >= before, vram / GIB
        before = found.context
    assert before


@pytest.mark.parametrize(("model", "context"), [("Llama-3.1-8B", 131072), ("Llama-2-7B", 16384)])
def test_a_larger_card_never_gets_a_shorter_window_or_a_lower_rung_for_it(model: str, context: int) -> None:
    best_last = [*reversed(ladder(None, None))]
    before = (0, 0)
    for vram in range(5 * GIB, 10 * GIB, 133 << 20):
        try:
            found = plan(facts(model), vram=vram, context=context)
        except DoesNotFitError:
            assert not before[0]
            continue
        if found.window is None:  # the whole text, if need be with two bits, comes before a window
            assert before[0] < context == found.context
            break
        now = (found.window, best_last.index(Rung(found.weights, found.kv_bits["k"], found.kv_bits["v"])))
        assert all(new >= old for new, old in zip(now, before, strict=True)), vram / GIB
        before = now
    assert before[0]


def test_the_host_is_taken_where_the_card_holds_fewer_halves_of_the_context() -> None:
    small, larger = (plan(facts("Llama-3.1-8B"), vram=size, goal="context") for size in ("6.5GiB", "7.5GiB"))
    assert small.on_host
    assert small.context == 131072 // 8
    alone = next(reason for reason in small.reasons if "the card alone holds" in reason)
    assert 131072 // 16 > int(alone.split("alone holds ")[1].split(" ")[0].replace(",", "")) > 2048
    assert not larger.on_host
    assert larger.context == larger.capacity
    assert 131072 // 4 < larger.context < 131072 // 2


def test_two_bits_that_nobody_asked_for_hold_no_more_than_is_of_use() -> None:
    found = plan(facts("Llama-2-7B"), vram=int(5.375 * GIB))
    assert (found.kv_bits, found.context) == ({"k": 2, "v": 2}, 2048)
    asked = plan(facts("Llama-2-7B"), vram=int(5.375 * GIB), kv_bits=2)
    assert asked.context >= 2048
