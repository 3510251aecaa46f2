"""Reuse changes nothing but the work: eight agents, batches, beams, chunks, turns, sliding layers, fewer bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.integration.compat import cache_in, generate_argument
from hf_ctxopt.integration.generate import slices_chunks
from tests.families import build
from tests.prefix.rig import STORE, draw, left_padded, reused, same, say, store

SYSTEM = draw(150, 1)
AGENTS = [SYSTEM + draw(9 + 5 * agent, 10 + agent) for agent in range(8)]
FAMILIES = ["llama", "mistral", "gemma3"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_eight_agents_compute_their_system_prompt_once(model: Any, route: str) -> None:
    wants = [say(model, text) for text in AGENTS]
    if route == "fused":
        hf_ctxopt.patch_model(model)
    for at, (text, want) in enumerate(zip(AGENTS, wants, strict=True)):
        got = say(model, text, {})
        same(got, want)
        assert reused(got) >= (144 if at else 0)
    for text, want in zip(AGENTS, wants, strict=True):
        got = say(model, text, {})
        same(got, want)
        assert reused(got) >= len(text) - 8
    assert store().stats()["hit_rate"] > 0.8


@pytest.mark.parametrize("call", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_a_batch_of_different_prefixes(model: Any, call: dict[str, Any]) -> None:
    others = [draw(70, 50) + draw(12, 51), draw(33, 52), AGENTS[0], AGENTS[3]]
    batch = left_padded(others)
    want = model.generate(**batch, max_new_tokens=8, do_sample=False, **call)
    config = {"page_size": 8, "store": STORE}
    say(model, others[0], {})
    say(model, AGENTS[5], {})
    for _ in range(2):
        got = model.generate(**batch, max_new_tokens=8, do_sample=False, cache_implementation="ctx_prefix",
                             cache_config=config, **call)  # fmt: skip
        assert torch.equal(got, want)
    assert store().stats()["hit_rate"] > 0.5


def test_rows_that_share_a_beginning_compute_it_once(model: Any) -> None:
    lengths: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    say(model, left_padded(AGENTS), {}, max_new_tokens=1)
    hook.remove()
    computed = sum(rows * columns for rows, columns in lengths)
    whole = sum(map(len, AGENTS))
    assert computed < len(SYSTEM) + (whole - 8 * len(SYSTEM)) + 8 * 3 * 8
    assert whole - computed <= store().stats()["reused_tokens"] <= whole - len(SYSTEM)


@pytest.mark.parametrize("size", [5, 16, 64])
def test_chunked_prefill(model: Any, size: int) -> None:
    """transformers before 5.23 would feed everything again: there the rest of the prompt is fed at once."""
    for text in (AGENTS[0], AGENTS[1]):
        want = say(model, text)
        got = say(model, text, {}, prefill_chunk_size=size)
        same(got, want)
    assert reused(got) >= 144
    assert not cache_in(got).stats()["prefix"]["not_reused"] or not slices_chunks(1)


def test_turns_with_the_returned_cache_and_without(model: Any) -> None:
    first = say(model, AGENTS[0], {})
    longer = [*first.sequences[0].tolist(), *draw(11, 3)]
    want = say(model, longer)
    inputs = {"input_ids": torch.tensor([longer])}
    again = model.generate(**inputs, **{generate_argument(): cache_in(first)}, max_new_tokens=8, do_sample=False)
    assert torch.equal(again, want.sequences)
    got = say(model, longer, {})
    same(got, want)
    assert reused(got) >= len(longer) - 8  # of the turn with the returned cache too


def test_sampling_draws_the_same(model: Any) -> None:
    outputs = []
    for config in (None, {}, {}):
        torch.manual_seed(7)
        outputs.append(say(model, AGENTS[2], config, do_sample=True, temperature=1.5).sequences)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_pages_are_shared_as_they_are(model: Any, bits: int) -> None:
    config = {"kv_bits": bits}
    cold = say(model, AGENTS[0], config)
    warm = say(model, AGENTS[0], config)
    assert reused(warm) >= len(AGENTS[0]) - 16
    want = say(model, AGENTS[0])
    tolerance = 0.05 if bits == 8 else 0.5
    for got in (cold, warm):
        torch.testing.assert_close(got.logits[0], want.logits[0], atol=tolerance, rtol=0)
    sealed = store().arenas[0].used.sealed
    assert sealed > 10
    assert store().stats()["bytes_used"] < 0.8 * len(AGENTS[0]) * store().arenas[0].page_bytes / 8


@pytest.mark.parametrize("window_from", [60, 143])
def test_a_sliding_layer_needs_only_its_window(window_from: int) -> None:
    """What no hit at the end of a text needs can go: a hit there stays, one in the middle is lost."""
    model = build("gemma3")
    text = AGENTS[7]
    say(model, text, {}, max_new_tokens=1)
    kept = store()
    before = kept.stats()["bytes_used"]
    assert kept.reclaim(1000)
    assert kept.stats()["dropped_pages"] > 10
    assert kept.stats()["evicted_pages"] == 0
    assert kept.stats()["bytes_used"] < before
    kept.check_integrity()
    got = say(model, text, {})
    same(got, say(model, text))
    assert reused(got) >= len(text) - 8
    parted = [*text[:window_from], *draw(40, 77)]
    got = say(model, parted, {})
    same(got, say(model, parted))  # whatever was found


def test_where_tokens_do_not_decide_nothing_is_reused() -> None:
    model = build("llama")
    say(model, AGENTS[0], {})
    ids = torch.tensor([AGENTS[0]])
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    cases = {
        "zeros": {"input_ids": ids, "attention_mask": holes},
        "more than token ids": {"inputs_embeds": model.get_input_embeddings()(ids)},
        "position_ids": {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] + 3},
    }
    for why, inputs in cases.items():
        got = say(model, inputs, {})
        assert reused(got) == 0
        assert any(why in reason for reason in cache_in(got).stats()["prefix"]["not_reused"])
        assert torch.equal(got.sequences, say(model, inputs).sequences)


def test_assisted_decoding_says_that_it_reuses_nothing() -> None:
    model = build("llama")
    want = say(model, AGENTS[0]).sequences
    got = say(model, AGENTS[0], {}, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, want)
    assert any("assisted" in reason for reason in cache_in(got).stats()["prefix"]["not_reused"])


def test_an_encoder_decides_too() -> None:
    model = build("bart")
    texts = [draw(20, 1), draw(20, 2)]
    wants = [model.generate(torch.tensor([text]), max_new_tokens=6, do_sample=False) for text in texts]
    for text, want in zip(texts, wants, strict=True):
        got = model.generate(torch.tensor([text]), max_new_tokens=6, do_sample=False,
                             cache_implementation="ctx_prefix", cache_config={"store": STORE})  # fmt: skip
        assert torch.equal(got, want)
    assert store().stats()["reused_tokens"] == 0
