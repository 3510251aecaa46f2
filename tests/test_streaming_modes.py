"""`ctx_sink` inside `generate`, evicting: the logits of every mode are StreamingLLM's for the tokens it chose.

The prompt just fits; every generated token evicts one. Whatever sampling, an assistant or a user chose as tokens, the
from-scratch reference reads the finished text and must come to the same logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import FAMILIES, assistant_for, model_for
from tests.feeding import routed
from tests.modes import LEFT_PADS, MODES, NEW_TOKENS, PROMPT_TOKENS, Case, Outcome
from tests.streaming_reference import streaming_logits

SINKS, WINDOW = 4, PROMPT_TOKENS - 4
OPTIONS: dict[str, Any] = {"sinks": SINKS, "window": WINDOW, "page_size": 4}
ONE_TOKEN_MODES = ["greedy", "sampling", "return_sequences", "left_padding", "return_dict", "saved_config"]
CHUNK_MODES = ["prefill_chunk", "prompt_lookup", "assisted", "multi_turn"]
"""These feed several tokens at once while evicting: exact on the fused route only."""
BOTH_ROUTES = ["beams", "sampling", "return_sequences", "left_padding", "bf16"]


def _run(family: str, mode: str, route: str, options: dict[str, Any] = OPTIONS) -> Outcome:
    spec = MODES[mode]
    ids, mask = spec.prompt()
    model = model_for(family, route, spec.dtype)
    named = {} if route == "fused" else {"cache_implementation": "ctx_sink", "cache_config": options}
    assistant = assistant_for(family) if mode == "assisted" else None
    with routed(route, model, "ctx_sink", **options):
        outcome = spec.run(Case(model=model, ids=ids, mask=mask, cache=named, assistant=assistant))
    outcome.cache.check_integrity()
    assert outcome.cache.stats()["tokens_evicted"] > 0
    return outcome


def _check_llama(route: str, mode: str, options: dict[str, Any]) -> None:
    """Every row's logits of the last turn are the reference's for the row's finished text."""
    outcome = _run("llama", mode, route, options)
    padded = MODES[mode].padded
    steps = 3 if mode == "multi_turn" else NEW_TOKENS
    copies = len(outcome.sequences) // (len(LEFT_PADS) if padded else 1)
    for row, sequence in enumerate(outcome.sequences):
        text = sequence[LEFT_PADS[row // copies] if padded else 0 :]
        expected = streaming_logits(
            model_for("llama", "reference"), text, SINKS, options["window"], options.get("n_discard")
        )
        torch.testing.assert_close(outcome.logits[-steps:, row], expected[-1 - steps : -1], atol=1e-4, rtol=0)


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize(
    ("route", "mode"),
    [("dense", mode) for mode in ONE_TOKEN_MODES] + [("fused", mode) for mode in ONE_TOKEN_MODES + CHUNK_MODES],
)
def test_logits_are_streaming_llm(route: str, mode: str) -> None:
    _check_llama(route, mode, OPTIONS)


@pytest.mark.parametrize("mode", BOTH_ROUTES)
@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("llama", "gemma3", "phi", "cohere", "glm")]
)
def test_both_routes_agree(family: str, mode: str) -> None:
    """Beams reorder and share pages; rows of a batch evict from different steps on."""
    dense, fused = _run(family, mode, "dense"), _run(family, mode, "fused")
    if mode == "bf16":
        torch.testing.assert_close(fused.logits[0].float(), dense.logits[0].float(), atol=0.1, rtol=0)
        return
    assert torch.equal(fused.sequences, dense.sequences)
    torch.testing.assert_close(fused.logits, dense.logits, atol=1e-4, rtol=0)


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("n_discard", [0, 3])
@pytest.mark.parametrize(
    ("route", "mode"),
    [("dense", "sampling"), ("fused", "sampling"), ("fused", "left_padding"), ("fused", "multi_turn")],
)
def test_logits_are_those_after_a_context_shift(route: str, mode: str, n_discard: int) -> None:
    """Rows of unequal padding shift at different times, which stock masks cannot say: refused on the dense route."""
    _check_llama(route, mode, {**OPTIONS, "window": WINDOW + 1, "n_discard": n_discard})


@pytest.mark.parametrize("mode", ["prompt_lookup", "assisted"])
@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("qwen3", "gemma3", "phi", "gpt_oss")]
)
def test_drafts_change_nothing(family: str, mode: str) -> None:
    """Candidates are taken back after an eviction that has to be taken back with them."""
    drafted = _run(family, mode, "fused")
    spec = MODES["greedy"]
    ids, mask = MODES[mode].prompt()
    model = model_for(family, "fused")
    with routed("fused", model, "ctx_sink", **OPTIONS):
        plain = spec.run(Case(model=model, ids=ids, mask=mask))
    assert torch.equal(drafted.sequences, plain.sequences)
    torch.testing.assert_close(drafted.logits, plain.logits, atol=1e-4, rtol=0)


def test_the_families_here_have_rotary_positions() -> None:
    for family in ("llama", "gemma3", "phi", "cohere", "glm", "qwen3", "gpt_oss"):
        assert FAMILIES[family].positions == "rope"
