"""Models of other shapes than the six of `models.py`: their facts by hand, and every plan's arithmetic."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_ctxopt import ConfigError, CtxoptError, DoesNotFitError, Plan, UnsupportedModelError, plan
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.layers import LayerShape

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 4096}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], int, int | None, int | None, list[LayerShape]]] = {
    # config, parameters (a tied head once), trained length, most tokens of a window, layers
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
         "max_position_embeddings": 32768},
        7_615_616_512, 32768, 32768, [LayerShape(28, 4, 128, 128)],
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
         "max_position_embeddings": 32768},
        494_032_768, 32768, 32768, [LayerShape(24, 2, 64, 64)],
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
         "num_experts_per_tok": 2, "max_position_embeddings": 32768, "tie_word_embeddings": False},
        46_702_792_704, 32768, 32768, [LayerShape(32, 8, 128, 128)],
    ),
    "Gemma-2B": (
        {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
         "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
         "max_position_embeddings": 8192},
        2_506_172_416, 8192, 8192, [LayerShape(18, 1, 256, 256)],
    ),
    "Gemma-2-9B": (
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
         "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
         "sliding_window": 4096, "max_position_embeddings": 8192},
        9_241_705_984, 8192, 8192, [LayerShape(21, 8, 256, 256, 4096), LayerShape(21, 8, 256, 256)],
    ),
    "TinyLlama-1.1B": (LLAMA, 1_100_048_384, 2048, 2048, [LayerShape(22, 4, 64, 64)]),
    "one key head": ({**LLAMA, "num_key_value_heads": 1}, 1_082_746_880, 2048, 2048, [LayerShape(22, 1, 64, 64)]),
    "StarCoder": (
        {"model_type": "gpt_bigcode", "vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48,
         "n_positions": 8192, "n_inner": 24576, "multi_query": True, "bos_token_id": 0, "eos_token_id": 0},
        15_517_456_384, 8192, None, [LayerShape(40, 1, 128, 128)],
    ),
    "yarn": (
        {**LLAMA, "max_position_embeddings": 65536, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0,
                             "original_max_position_embeddings": 2048}},
        1_100_048_384, 65536, 65536, [LayerShape(22, 4, 64, 64)],
    ),
    "longrope": (
        {**LLAMA, "max_position_embeddings": 131072, "tie_word_embeddings": False, "rope_parameters": ROPE},
        1_100_048_384, 131072, 4095, [LayerShape(22, 4, 64, 64)],
    ),
    "dynamic": (
        {**LLAMA, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        1_100_048_384, 2048, 2047, [LayerShape(22, 4, 64, 64)],
    ),
}  # fmt: skip
TEXT = {**LLAMA, "num_hidden_layers": 4, "head_dim": 64}
SMALL = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 6}
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "layer_types": ["full_attention"] * 4},
        "vision_config": {"model_type": "siglip_vision_model", **SMALL},
    },
    "llava": {"text_config": TEXT, "vision_config": {"model_type": "clip_vision_model", **SMALL}},
    "qwen2_audio": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 96, "encoder_layers": 6,
                         "encoder_attention_heads": 6, "encoder_ffn_dim": 128},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "model_type": "qwen2_vl_text",
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}},
        "vision_config": {"depth": 6, "embed_dim": 96, "num_heads": 6, "hidden_size": 2048},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHAPES))
def test_facts_are_those_of_the_model(name: str) -> None:
    config, parameters, trained, limit, layers = SHAPES[name]
    found = facts_of(config)
    assert sum(matrix.numel for matrix in found.matrices) == parameters
    assert (found.trained, found.window_limit, list(found.groups)) == (trained, limit, layers)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_plan_adds_up_and_fits(name: str) -> None:
    config, parameters, trained, _, layers = SHAPES[name]
    found = facts_of(config)
    made = 0
    for vram in (8, 24, 80):
        for wanted in ({}, {"goal": "speed"}, {"goal": "context"}, {"agents": 3}, {"batch": 4, "kv_bits": 4}):
            try:
                got = plan(found, vram=f"{vram}GiB", **wanted)  # type: ignore[arg-type]
            except DoesNotFitError:
                continue
            made += 1
            assert got.total_bytes == sum(got.bytes.values()) <= got.vram
            assert got.pages * got.page_bytes <= got.page_budget < (got.pages + 1) * got.page_bytes
            assert got.window is None
            assert got.context <= (got.capacity or got.context) <= (trained or got.context)
            assert Plan.from_dict(json.loads(json.dumps(got.to_dict()))) == got
            growing = [layer for layer in layers if layer.window is None]
            if got.kv_bits["k"] == 16:
                values = sum(layer.layers * layer.kv_heads * 2 * layer.key_dim for layer in growing)
                assert got.page_bytes == 32 * 2 * values
            if got.weights == "bf16" and not got.on_host:
                assert got.bytes["weights"] + got.bytes["embeddings"] == 2 * parameters
    assert made >= (3 if name == "Mixtral-8x7B" else 8)


@pytest.mark.parametrize("kind", list(COMPOSITE))
def test_the_keys_and_values_of_a_composite_model_are_its_decoders(kind: str) -> None:
    """The encoder beside it has numbered layers with key projections of its own, of other sizes."""
    found = facts_of({"model_type": kind, **COMPOSITE[kind]})
    assert [(group.layers, group.kv_heads, group.key_dim) for group in found.groups] == [(4, 4, 64)]
    assert found.layers == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "deepseek_v3"}, "latent"), ({"model_type": "deepseek_v2"}, "latent"),
        ({"model_type": "whisper"}, "encoder-decoder"), ({"model_type": "vit"}, "vocab_size"),
        ({"model_type": "mamba"}, "num_attention_heads"), ({"model_type": "clip"}, "clip"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_for_is_refused_in_a_sentence(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        plan(config, vram="8GiB")
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_a_context_beyond_learned_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="positions do not allow"):
        plan(SHAPES["StarCoder"][0], vram="80GiB", context=16384)
    with pytest.raises(CtxoptError):
        plan({"model_type": "no_such_model"}, vram="8GiB")
