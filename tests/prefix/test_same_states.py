"""Equal tokens are not enough: what else decides about keys and values is never shared, or stops the reuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_ctxopt.integration.compat import cache_in, generate_argument
from tests.families import _sharpen, build
from tests.prefix.rig import draw, reused, same, say

TEXT, MORE = draw(70, 1), draw(40, 2)


def ids(*texts: list[int]) -> dict[str, torch.Tensor]:
    rows = torch.tensor(texts)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def test_zeros_as_token_type_ids_add_an_embedding() -> None:
    model = build("gpt2")
    typed = {**ids(TEXT), "token_type_ids": torch.zeros(1, len(TEXT), dtype=torch.long)}
    say(model, TEXT, {})
    for hit in (0, 64):
        got = say(model, typed, {})
        same(got, say(model, typed))
        assert hit <= reused(got) <= hit + 8
    same(say(model, TEXT, {}), say(model, TEXT))


@pytest.mark.parametrize("kind", ["Qwen3Next", "Lfm2"])
def test_layers_with_a_running_state_are_computed(kind: str) -> None:
    linear = "conv" if kind == "Lfm2" else "linear_attention"
    more: dict[str, Any] = {} if kind == "Lfm2" else {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=[linear, "full_attention"], pad_token_id=0, bos_token_id=1, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = None
    _sharpen(model, 0.0)
    say(model, TEXT, {})
    got = say(model, TEXT + MORE, {})
    same(got, say(model, TEXT + MORE))
    assert any("state" in reason for reason in cache_in(got).stats()["prefix"]["not_reused"])


def test_frequencies_that_change_with_length() -> None:
    model = build("dynamic_rope", max_position_embeddings=64)
    long = TEXT[:50] + MORE + TEXT[:30]
    say(model, TEXT[:50], {})
    say(model, TEXT[:20])  # transformers forgets the longer length it has seen
    got = say(model, long, {})
    say(model, TEXT[:20])
    same(got, say(model, long))
    assert reused(say(model, TEXT[:50], {})) >= 40


def test_a_hook_on_a_layer_has_texts_of_its_own() -> None:
    model = build("llama")
    say(model, TEXT, {})
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.3)
    for hit in (0, 64):
        got = say(model, TEXT, {})
        same(got, say(model, TEXT))
        assert hit <= reused(got) <= hit + 8


def test_a_returned_cache_of_another_text_gives_nothing_to_the_store() -> None:
    model = build("llama")
    out = say(model, TEXT, {})
    edited = [*TEXT[:5], TEXT[5] % 80 + 4, *TEXT[6:], *out.sequences[0, 70:].tolist(), *MORE]
    say(model, edited, **{generate_argument(): cache_in(out)})  # stock transformers reads the old tokens too
    same(say(model, edited, {}), say(model, edited))


def test_a_returned_cache_of_another_mode_gives_nothing_to_the_store() -> None:
    model = build("llama", attention_dropout=0.5)
    out = say(model.train(), TEXT, {})
    text = out.sequences[0].tolist() + MORE
    say(model.eval(), text, **{generate_argument(): cache_in(out)})
    same(say(model, text, {}), say(model, text))


def test_a_returned_cache_goes_on_and_is_kept() -> None:
    model = build("llama")
    out = say(model, TEXT, {})
    text = out.sequences[0].tolist() + MORE
    say(model, text, **{generate_argument(): cache_in(out)})
    got = say(model, text, {})
    same(got, say(model, text))
    assert reused(got) >= len(text) - 8


def with_adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    wrapped.set_adapter("a")
    return wrapped.eval()


def test_an_adapter_that_is_switched_between_turns() -> None:
    model = with_adapters(build("llama"))
    out = say(model, ids(TEXT), {})
    model.set_adapter("b")
    text = ids(out.sequences[0].tolist() + MORE)
    say(model, text, **{generate_argument(): cache_in(out)})
    same(say(model, text, {}), say(model, text))


def test_adapters_chosen_row_by_row() -> None:
    model = with_adapters(build("llama"))
    say(model, ids(TEXT, TEXT), {})
    names = {"adapter_names": ["a", "b"]}
    got = say(model, ids(TEXT, TEXT), {}, **names)
    same(got, say(model, ids(TEXT, TEXT), **names))
    assert reused(got) == 0


def test_virtual_tokens_before_the_prompt() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    say(model, TEXT, {})
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with torch.no_grad():
        for weight in tuned.prompt_encoder.parameters():
            weight.normal_()
    same(say(tuned, ids(TEXT), {}), say(tuned, ids(TEXT)))
