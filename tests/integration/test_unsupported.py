"""What cannot be right is refused before the first token, and says so; what can be right on the same models works.

Evicting needs positions that are relative and can be shifted. Without them `ctx_sink` may only serve texts that it
holds whole (learned positions inside their table excepted), and `ctx_paged` serves all.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_ctxopt
from hf_ctxopt import ConfigError, InterruptedStepError, UnsupportedModelError
from hf_ctxopt.integration import rope
from tests.families import VOCAB, build
from tests.feeding import feed, pad_left

IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
SINK = {"window": 8, "sinks": 2, "page_size": 4}
TABLES = ["gpt2", "opt", "bart"]
REFUSALS = {"t5": "no rotary positions", "bloom": "no rotary positions", "falcon_alibi": "ALiBi", "deepseek_v3": "MLA"}


def _generate(model: nn.Module, cache: str | None, new: int = 12, ids: torch.Tensor = IDS, **options: Any) -> Any:
    config = options.pop("cache_config", None)
    named = {} if cache is None else {"cache_implementation": cache, "cache_config": config}
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **{**settings, **named, **options})


def _same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of a model that generates, once for each of its forward passes; position probes only run decoders."""
    ran: list[str] = []
    real = transformers.PreTrainedModel.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.can_generate():
            ran.append(type(self).__name__)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "__call__", count)
    return ran


@pytest.mark.parametrize("family", [*REFUSALS, *TABLES, "falcon"])
@pytest.mark.parametrize("route", ["dense", "patched"])
def test_paged_serves_every_model(family: str, route: str) -> None:
    model = build(family)
    expected = _generate(model, None)
    if route == "patched":
        hf_ctxopt.patch_model(model)
    got = _generate(model, "ctx_paged", cache_config={"page_size": 4})
    _same(got, expected)
    cache = getattr(got.past_key_values, "self_attention_cache", got.past_key_values)
    assert cache.name == "ctx_paged"
    cache.check_integrity()


# ---- positions that cannot be shifted


@pytest.mark.parametrize("family", REFUSALS)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2, "output_logits": False}, {"do_sample": True}], ids=str)
def test_eviction_is_refused_before_the_first_token(family: str, mode: dict[str, Any], forwards: list[str]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s){REFUSALS[family]}.*ctx_paged") as caught:
        _generate(build(family), "ctx_sink", cache_config=SINK, **mode)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, hf_ctxopt.CtxoptError)
    assert forwards == []


@pytest.mark.parametrize("family", REFUSALS)
def test_eviction_is_refused_on_a_patched_model(family: str, forwards: list[str]) -> None:
    model = hf_ctxopt.patch_model(build(family), "ctx_sink", **SINK)
    with pytest.raises(UnsupportedModelError, match=REFUSALS[family]):
        model.generate(IDS, max_new_tokens=12)
    assert forwards == []


@pytest.mark.parametrize("family", REFUSALS)
def test_texts_that_the_window_holds_whole_are_served(family: str) -> None:
    model = build(family)
    got = _generate(model, "ctx_sink", cache_config={"window": 64, "page_size": 4})
    _same(got, _generate(model, None))


@pytest.mark.parametrize("family", ["bloom", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_manual_loop_is_stopped_where_eviction_would_begin(family: str, chunk: int) -> None:
    """Nobody knows how long a manual loop will be: it runs as far as it is right. The refused step takes nothing."""
    model = build(family)
    size = SINK["window"] + SINK["sinks"]
    steps = size // chunk * chunk
    expected = feed(model, IDS, transformers.DynamicCache(config=model.config), chunk)
    cache = hf_ctxopt.make_cache(model, "ctx_sink", **SINK)
    got = [feed(model, IDS[:, :steps], cache, chunk)]
    held = cache.stats()
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=REFUSALS[family]):
            feed(model, IDS[:, steps : steps + chunk], cache, chunk)
        assert cache.stats() | {"steps": 0} == held | {"steps": 0}
        assert cache.get_seq_length() == steps
        cache.check_integrity()
    cache.crop(-2)
    got[0] = got[0][:, :-2]
    got.append(feed(model, IDS[:, steps - 2 : steps], cache, 1))
    torch.testing.assert_close(torch.cat(got, 1), expected[:, :steps], atol=1e-4, rtol=0)


def test_a_refusal_in_the_middle_of_a_forward_pass_can_be_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding layer of Gemma 3 has stored the step, and evicted for it, when the first full layer refuses."""
    model = build("gemma3")
    monkeypatch.setitem(rope._known, rope.decoder_of(model), rope.PositionFacts(refusal="for the test"))
    refused, free = (hf_ctxopt.make_cache(model, "ctx_sink", window=16, sinks=0, page_size=4) for _ in range(2))
    for group in free.groups:
        group.before_eviction = None
    expected = feed(model, IDS, free, 1)
    feed(model, IDS[:, :16], refused, 1)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="for the test"):
            feed(model, IDS[:, 16:17], refused, 1)
        refused.settle()
        refused.check_integrity()
        assert refused.get_seq_length() == 16
    for group in refused.groups:
        group.before_eviction = None
    assert torch.equal(feed(model, IDS[:, 16:], refused, 1), expected[:, 16:])


# ---- tables of positions


@pytest.mark.parametrize("family", TABLES)
def test_a_text_longer_than_the_models_table_is_refused(family: str, forwards: list[str]) -> None:
    prompt = 1 if family == "bart" else IDS.shape[1]
    model = _short(family)
    with pytest.raises(UnsupportedModelError, match=r"reach 33 tokens.*learned 32 positions.*max_new_tokens"):
        _generate(model, "ctx_sink", new=33 - prompt, cache_config=SINK)
    assert forwards == []


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("route", ["dense", "patched"])
def test_eviction_inside_the_table_is_allowed(family: str, route: str) -> None:
    """Positions are part of the hidden states there: nothing has to be shifted, and the window is the text's own."""
    prompt = 1 if family == "bart" else IDS.shape[1]
    model = _short(family)
    if route == "patched":
        hf_ctxopt.patch_model(model)
    out = _generate(model, "ctx_sink", new=32 - prompt, cache_config=SINK)
    cache = getattr(out.past_key_values, "self_attention_cache", out.past_key_values)
    assert cache.stats()["tokens_evicted"] > 0
    assert cache.get_seq_length() == 31
    if family != "bart":
        manual = hf_ctxopt.make_cache(model, "ctx_sink", **SINK)
        logits = feed(model, out.sequences[:, :-1], manual, 1)
        masked = _windowed(model, out.sequences[:, :-1])
        torch.testing.assert_close(logits, masked, atol=1e-4, rtol=0)


@functools.cache
def _short(family: str) -> nn.Module:
    """A model with 32 learned positions."""
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB, "eos_token_id": None}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": None, "pad_token_id": 0}
    if family == "opt":
        shape |= {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, word_embed_proj_dim=32)).eval()
    shape |= {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    shape |= {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**shape, forced_eos_token_id=None)).eval()


@torch.no_grad()
def _windowed(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one forward pass under a dense mask of sinks and window: what eviction must equal here."""
    place = torch.arange(ids.shape[1])
    past = place[:, None] - place[None]
    seen = (past >= 0) & ((past < SINK["window"]) | (place[None] < SINK["sinks"]))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(len(ids), 1, -1, -1)
    attn = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = model(ids, attention_mask=mask, position_ids=place[None], use_cache=False).logits
    finally:
        model.set_attn_implementation(attn)
    return logits


# ---- models without a KV cache, encoder-decoder models, padding


def _mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=None
    )
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_models_without_attention(name: str, forwards: list[str]) -> None:
    model = _mamba()
    for call in (
        lambda: _generate(model, name),
        lambda: hf_ctxopt.make_cache(model, name),
        lambda: hf_ctxopt.patch_model(model, name).generate(IDS, max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedModelError, match=r"Mamba.*(kind of cache|no attention layer)"):
            call()
    hf_ctxopt.unpatch_model(model)
    assert forwards == []
    assert model.generate(IDS, max_new_tokens=2).shape == (2, 22)


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_layers_without_attention_keep_their_own_state(name: str) -> None:
    """LFM2 mixes short convolutions with attention: pages hold the attention layers only."""
    model = _lfm2(["conv", "full_attention", "conv"])
    expected = _generate(model, None)
    for patch in (False, True):
        if patch:
            hf_ctxopt.patch_model(model)
        got = _generate(model, name)
        _same(got, expected)
        assert [group["layers"] for group in got.past_key_values.stats()["groups"]] == [[1]]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "output_logits": False}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("name", "config"), [("ctx_paged", {"page_size": 4}), ("ctx_sink", {"window": 64})])
def test_encoder_decoder_self_attention(name: str, config: dict[str, Any], mode: dict[str, Any]) -> None:
    model = build("bart")
    lengths = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])
    expected = _generate(model, None, attention_mask=lengths, **mode)
    for patch in (False, True):
        if patch:
            hf_ctxopt.patch_model(model, name, **config)
        named = {} if patch else {"cache": name, "cache_config": config}
        got = _generate(model, attention_mask=lengths, **{"cache": None, **named}, **mode)
        assert torch.equal(got.sequences, expected.sequences)
        assert got.past_key_values.self_attention_cache.name == name
        got.past_key_values.self_attention_cache.check_integrity()


@pytest.mark.parametrize("ragged", [True, False])
def test_context_shift_of_ragged_rows(ragged: bool, forwards: list[str]) -> None:
    """Stock masks cannot describe rows that shift at different times; the fused route can."""
    rows = [IDS[0], IDS[1, 7:] if ragged else IDS[1]]
    ids, mask = pad_left(rows)
    model, options = build("llama"), {**SINK, "n_discard": 3}
    if ragged:
        for refused in (
            lambda: _generate(model, "ctx_sink", ids=ids, attention_mask=mask, cache_config=options),
            lambda: hf_ctxopt.make_cache(model, "ctx_sink", attention_mask=mask, **options),
        ):
            with pytest.raises(ConfigError, match=r"n_discard=3.*patch_model"):
                refused()
        assert forwards == []
    else:
        _generate(model, "ctx_sink", ids=ids, attention_mask=mask, cache_config=options)
    with hf_ctxopt.patched(model, "ctx_sink", **options):
        together = _generate(model, None, ids=ids, attention_mask=mask).sequences
        for row, got in zip(rows, together, strict=True):
            alone = _generate(model, None, ids=row[None]).sequences
            assert torch.equal(got[-12:], alone[0, -12:])


# ---- layers with a state of their own


def _lfm2(kinds: list[str]) -> nn.Module:
    config = transformers.Lfm2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, layer_types=kinds, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config).eval()


def test_a_crop_that_a_convolution_cannot_follow_changes_nothing() -> None:
    model = _lfm2(["full_attention", "conv", "full_attention"])
    expected = feed(model, IDS, transformers.DynamicCache(config=model.config), 1, prefill=9)
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=4)
    feed(model, IDS[:, :9], cache, 9)
    with pytest.raises(ConfigError, match=r"tokens_to_remove=-2.*LinearAttention.*activate_past_recording"):
        cache.crop(-2)
    torch.testing.assert_close(feed(model, IDS[:, 9:12], cache, 1), expected[:, 9:12], atol=1e-4, rtol=0)
    cache.layers[1].activate_past_recording()
    feed(model, IDS.flip(1)[:, :3], cache, 3)
    cache.crop(-3)
    torch.testing.assert_close(feed(model, IDS[:, 12:], cache, 1), expected[:, 12:], atol=1e-4, rtol=0)


def test_a_step_that_a_convolution_has_seen_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _lfm2(["full_attention", "conv", "full_attention"])
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=4)
    expected = feed(model, IDS, cache, 20)
    cache.settle()
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(model, IDS[:, :1], cache, 1)
    for _ in range(2):
        with pytest.raises(InterruptedStepError, match=r"LinearAttention.*reset"):
            cache.settle()
    cache.reset()
    assert torch.equal(feed(model, IDS, cache, 20), expected)
