"""The mixes' per-tensor types and the sizes they give."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, MistralConfig, Phi3Config

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.weights.mixes import MIXES, Shape, fitting_type, more_bits, tensor_type
from hf_ctxopt.weights.roles import Role, kept, role
from hf_ctxopt.weights.shapes import meta_model, shape_of, weights_of
from tests.weights.file_sizes import size_of

LLAMA2 = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
MISTRAL = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)
LLAMA31 = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.mark.parametrize(
    ("config", "mix", "size"),
    [
        (LLAMA2, "Q4_K_M", 4.080e9),
        (LLAMA2, "Q5_K_M", 4.782e9),
        (MISTRAL, "Q4_K_M", 4.368e9),
        (LLAMA31, "Q4_K_M", 4.92e9),
        # Published files, less the tokenizer: llama.cpp's table of Llama-2-7B (GiB with two decimals).
        (LLAMA2, "Q4_K_S", 3.59 * 2**30),
        (LLAMA2, "Q6_K", 5.15 * 2**30),
        (LLAMA2, "Q4_0", 3.56 * 2**30),
    ],
)
def test_published_sizes(config, mix, size):
    assert size_of(config, mix) == pytest.approx(size, rel=0.002)


def test_layers_with_more_bits():
    assert [layer for layer in range(32) if more_bits(layer, 32)] == [
        *range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mix", "model", "expected"),
    [
        ("model.layers.0.self_attn.v_proj", "Q4_K_M", Shape(32), "Q6_K"),
        ("model.layers.5.self_attn.v_proj", "Q4_K_M", Shape(32), "Q4_K"),
        ("model.layers.5.self_attn.v_proj", "Q4_K_M", Shape(80, large_gqa=True), "Q6_K"),
        ("model.layers.11.self_attn.v_proj", "Q4_K_M", Shape(80, large_gqa=True), "Q5_K"),
        ("model.layers.3.self_attn.v_proj", "Q4_K_S", Shape(32), "Q5_K"),
        ("model.layers.4.self_attn.v_proj", "Q4_K_S", Shape(32), "Q4_K"),
        ("model.layers.3.mlp.down_proj.weight", "Q4_K_S", Shape(32), "Q5_K"),
        ("model.layers.31.mlp.down_proj.weight", "Q5_K_M", Shape(32), "Q6_K"),
        ("model.layers.0.mlp.gate_up_proj", "Q4_K_M", Shape(32), "Q4_K"),
        ("model.layers.0.self_attn.qkv_proj", "Q4_K_M", Shape(32), "Q6_K"),
        ("model.layers.7.self_attn.k_proj", "Q4_K_M", Shape(32, experts=8), "Q8_0"),
        ("model.layers.7.self_attn.o_proj", "Q4_K_M", Shape(32, experts=8), "Q5_K"),
        ("model.layers.7.self_attn.o_proj", "Q5_K_M", Shape(32, experts=8), "Q5_K"),
        ("transformer.h.1.mlp.dense_4h_to_h", "Q4_K_M", Shape(32, falcon=True), "Q6_K"),
        ("transformer.h.3.mlp.dense_4h_to_h", "Q4_K_M", Shape(32, falcon=True), "Q5_K"),
        ("lm_head", "Q4_K_M", Shape(32, falcon=True), "Q8_0"),
        ("lm_head", "Q4_K_M", Shape(32), "Q6_K"),
        ("lm_head", "Q4_0", Shape(32), "Q6_K"),
        ("lm_head", "Q8_0", Shape(32), "Q8_0"),
        ("model.embed_tokens", "Q4_K_M", Shape(32), "Q4_K"),
        ("model.embed_tokens", "Q4_K_M", Shape(32, tied=True), "Q6_K"),
        ("model.layers.0.input_layernorm", "Q4_K_M", Shape(32), None),
        ("model.layers.0.block_sparse_moe.gate", "Q4_K_M", Shape(32, experts=8), None),
    ],
)
def test_types_by_rule(name, mix, model, expected):
    assert tensor_type(name, (512, 512), mix, model) == expected


def test_columns_that_are_no_multiple_of_256():
    """SmolLM2's 576."""
    assert [fitting_type(name, 576) for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")] == ["Q5_0", "Q5_1", "Q8_0", "Q8_0"]
    assert fitting_type("Q4_K", 48) is None
    assert tensor_type("model.embed_tokens", (100, 576), "Q4_K_M", Shape(30, tied=True)) == "Q8_0"
    assert tensor_type("model.norm.weight", (576,), "Q4_K_M", Shape(30)) is None
    with pytest.raises(ConfigError, match="mix='Q3_K_L'"):
        tensor_type("lm_head", (5, 576), "Q3_K_L", Shape(30))
    assert all(tensor_type("lm_head", (5, 768), mix, Shape(30)) for mix in MIXES)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen2", "qwen3", "gemma3_text", "falcon", "gpt_neox", "mixtral"])
def test_every_matrix_of_a_family_has_a_role(family):
    config = AutoConfig.for_model(family)
    model = meta_model(config)
    unknown = [
        name for name, size in weights_of(model) if len(size) > 1 and not kept(name) and role(name) is Role.OTHER
    ]
    assert not unknown
    names = {role(name) for name, _ in weights_of(model)}
    assert {Role.EMBEDDING, Role.DOWN, Role.ATTENTION_OUT} <= names
    assert size_of(model, "Q4_K_M") < size_of(model, "Q5_K_M") < size_of(model, "Q8_0")


def test_shape_of_a_config():
    assert shape_of(LLAMA2) == Shape(32)
    assert shape_of(GPT2Config()).tied
    assert shape_of(LlamaConfig(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)).large_gqa
    assert shape_of(Phi3Config()).layers == 32
