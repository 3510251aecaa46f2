"""Needs of a prompt: from attention that is known because it was built by hand, and from models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import hf_ctxopt
from hf_ctxopt import ConfigError, UnsupportedModelError, make_cache
from hf_ctxopt.integration import probe as module
from hf_ctxopt.integration.attention_mass import Scored
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.probe import LAST, SINKS, candidates, probe
from hf_ctxopt.planner.needs import Needs
from tests.families import FAMILIES, build
from tests.planner.models import facts

TOKENS, ANSWER = 1200, 8
IDS = torch.randint(2, 100, (1, 90), generator=torch.Generator().manual_seed(0))


def by_hand(sought: dict[int, float], chunk: int = 400) -> Needs:
    """Needs of one head whose queries all give 0.2 to the first token, 0.3 to a delimiter and the rest to themselves.

    Args:
        sought: distance of a token → what the answer's queries give it (the query's own share is the less).
        chunk: tokens read at once.
    """
    whole = TOKENS + ANSWER
    rows = torch.zeros(whole, whole)
    rows[:, 0], rows[20:, 20] = 0.2, 0.3
    for query in range(TOKENS - LAST, whole):
        for distance, share in sought.items():
            rows[query, query - distance] = share
    rows += torch.diag(1 - rows.sum(1))  # what is left is the query's own
    keys = torch.eye(whole)[None]
    watch = module._Watch(TOKENS, LAST, candidates(TOKENS), 32)
    end = TOKENS - LAST
    stops = [*range(chunk, end, chunk), end, TOKENS, *range(TOKENS + 1, whole + 1)]
    for start, stop in zip([0, *stops], stops, strict=False):
        call = Scored(rows[None, start:stop].log(), keys[:, :stop], torch.randn(1, stop, 8), 1.0)
        watch._look(0, Scored(call.query[..., :].clamp_min(-100), call.key, call.value, 1.0))
        watch.read = stop
    return watch.needs(DynamicCache())


def test_what_all_queries_attend_to_is_outside_and_not_sought() -> None:
    needs = by_hand({})
    group = needs.groups[0]
    assert (needs.tokens, needs.queries, needs.windows) == (TOKENS, LAST + ANSWER, (256, 384, 512))
    assert group.answer == pytest.approx([0.3] * 3, abs=1e-5)
    # Every fourth query of the text is looked at; the delimiter is outside for those 20 tokens and a window behind it.
    seen = [(len(range(4 + w, TOKENS - LAST, 4)), len(range(20 + w, TOKENS - LAST, 4))) for w in needs.windows]
    assert group.text == pytest.approx([0.3 * outside / counted for counted, outside in seen], abs=1e-5)
    assert group.sought == pytest.approx([0.0] * 3, abs=1e-6)
    assert needs.window == 256


@pytest.mark.parametrize("chunk", [400, 77])
def test_a_needle_is_sought_and_no_window_keeps_it(chunk: int) -> None:
    needs = by_hand({1100: 0.2}, chunk)
    group = needs.groups[0]
    assert group.answer == pytest.approx([0.5] * 3, abs=1e-5)
    assert group.sought == pytest.approx([0.2] * 3, abs=1e-5)
    assert needs.window is None


def test_code_needs_what_lies_between() -> None:
    needs = by_hand({300: 0.1, 5: 0.2})
    group = needs.groups[0]
    assert group.answer == pytest.approx([0.4, 0.3, 0.3], abs=1e-5)
    assert group.sought == pytest.approx([0.1, 0.0, 0.0], abs=1e-5)
    assert needs.window == 384


def test_tasks_get_settings_of_their_own() -> None:
    settings = []
    for sought in ({}, {300: 0.1}, {1100: 0.2}):
        found = hf_ctxopt.plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384, probe=by_hand(sought))
        settings.append((found.cache, found.window, found.weights))
    assert len(set(settings)) == 3
    assert [window for _, window, _ in settings] == [256, 384, None]


def test_candidates_leave_as_much_outside_as_inside() -> None:
    assert candidates(519) == ()
    assert candidates(520) == (256,)
    assert all(SINKS + window <= 2500 for window in candidates(5000))
    assert candidates(5000) == (256, 384, 512, 768, 1024, 1536, 2048)


REFUSED = {"falcon", "falcon_alibi", "bloom", "bart", "t5", "deepseek_v3"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the weights that the model's own eager attention returns; and the model is as it was."""
    monkeypatch.setattr(module, "LEAST_WINDOW", 16)
    monkeypatch.setattr(module, "CHUNK", 32)
    model: Any = build(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError):
            probe(model, IDS)
        return
    before = model.config._attn_implementation, dict(AttentionInterface._global_mapping)
    needs = probe(model, IDS, answer=0, page_size=8)
    assert (model.config._attn_implementation, dict(AttentionInterface._global_mapping)) == before
    assert not any("probe" in name for name in AttentionMaskInterface._global_mapping)
    assert sum(group.layers for group in needs.groups) == model.config.num_hidden_layers
    assert (needs.windows, needs.queries) == ((16, 24, 32), LAST)
    for group in needs.groups:
        assert all(0 <= share <= mass <= 1 for share, mass in zip(group.sought, group.answer, strict=True))
        assert 0 < group.key_errors[0] < group.key_errors[1] < group.key_errors[2]
    if name in ("diffllama", "doge", "gpt_oss"):  # eager attention returns other weights there, or fewer
        return
    eager: Any = build(name, attn="eager")
    with torch.no_grad():
        weights = eager(IDS, output_attentions=True).attentions
    expected: dict[int | None, list[float]] = {}
    layers = DynamicCache(config=model.config).layers
    for index, row in enumerate(weights):
        own = getattr(layers[index], "sliding_window", None) if index < len(layers) else None
        far = torch.arange(90)[None] <= torch.arange(90)[:, None] - 16
        far &= torch.arange(90)[None] >= SINKS
        expected.setdefault(own, []).append(float((row[0] * far)[:, -LAST:].sum(-1).mean()))
    for group in needs.groups:
        of_group = expected[group.window]
        assert group.answer[0] == pytest.approx(sum(of_group) / len(of_group), abs=1e-4)
        if group.window is not None:
            assert group.answer[0] == 0  # its own window is shorter


def test_a_patched_model_stays_patched() -> None:
    model: Any = build("llama")
    plain = probe(model, IDS)
    hf_ctxopt.patch_model(model, "ctx_sink", window=32)
    model.train()
    assert probe(model, IDS) == plain
    assert model.training
    model.eval()
    assert model.config._attn_implementation == "ctxopt"
    cache = make_cache(model, "ctx_paged")
    model(IDS, **{generate_argument(): cache})
    assert cache.stats()["tokens_held"] == 90


def test_an_error_leaves_the_model_as_it_was() -> None:
    model: Any = build("llama")
    names = set(AttentionInterface._global_mapping)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    hook = model.model.layers[-1].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        probe(model, IDS)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert set(AttentionInterface._global_mapping) == names


@pytest.mark.parametrize(
    "prompt",
    ["text", "", [], [[1, 2]], [1.5] * 64, torch.zeros(2, 64, dtype=torch.long), [1] * 10, [1] * 600, 7, b"x" * 64],
)
def test_bad_prompts_name_their_field(prompt: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        probe(build("llama"), prompt)
    assert refused.value.field == "probe"


@pytest.mark.parametrize(
    "prompt",
    [
        IDS.float(), IDS > 3, IDS.bfloat16(), [True] * 64, [1] * 63 + [True], [1] * 63 + [-1], [1] * 63 + [10**6],
        [1] * 63 + [2**70], torch.full((1, 64), 10**6), -IDS - 1,
    ],
)  # fmt: skip
def test_what_are_no_ids_of_the_model_is_refused(prompt: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        probe(build("llama"), prompt)
    assert refused.value.field == "probe"
    assert "token ids" in refused.value.allowed


def test_the_last_id_of_the_vocabulary_is_one() -> None:
    model: Any = build("llama")
    last = model.config.vocab_size - 1
    assert probe(model, [last] * 40, answer=0).tokens == 40
    with pytest.raises(ConfigError, match=f"below the {last + 1:,}"):
        probe(model, [last + 1] * 40, answer=0)


def test_plan_measures_the_prompt_it_is_given() -> None:
    model: Any = build("llama")
    found = hf_ctxopt.plan(model, vram="1GiB", reserve=0, probe=IDS)
    assert found.needs == probe(model, IDS)
    with pytest.raises(ConfigError, match="tokenizer"):
        hf_ctxopt.plan(model, vram="1GiB", reserve=0, probe="a text")
    with pytest.raises(ConfigError, match="no weights"):
        hf_ctxopt.plan(model.config, vram="1GiB", reserve=0, probe=IDS)


REAL_TOKENS = 800
FACT = " The secret number of Amsterdam is 48213. "
QUESTION = "\n\nWhat is the secret number of Amsterdam? Answer with the number."


def _real_prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    from pydoc_data.topics import topics

    text = "\n\n".join(value for _, value in sorted(topics.items()) if len(value) > 2000)
    body = tokenizer.decode(tokenizer(text)["input_ids"][: REAL_TOKENS - 60])
    cut = len(body) // 8
    prompts = {"recent": body + FACT + QUESTION, "needle": body[:cut] + FACT + body[cut:] + QUESTION}
    return {
        name: tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        for name, prompt in prompts.items()
    }


def test_a_real_model_tells_a_needle_from_what_is_recent(smollm2: Any) -> None:
    """The same question on the same text: what it asks for lies at the end, or at the beginning."""
    found = {
        name: hf_ctxopt.plan(facts("Llama-2-7B"), vram="8GiB", probe=probe(smollm2.model, ids, answer=8))
        for name, ids in _real_prompts(smollm2.tokenizer).items()
    }
    recent, needle = found["recent"], found["needle"]
    assert recent.window in (256, 384)
    assert needle.window is None
    assert recent.needs is not None
    assert needle.needs is not None
    assert needle.needs.outside(256)[1] > 2 * recent.needs.outside(256)[1]
    assert (recent.cache, needle.cache) == ("ctx_sink", "ctx_paged")
