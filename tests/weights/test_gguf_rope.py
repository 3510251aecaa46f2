"""Scaled rotary embeddings in `.gguf` files: written as llama.cpp's converter does, and read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_ctxopt import UnsupportedModelError
from hf_ctxopt.weights.codecs import encode
from hf_ctxopt.weights.gguf_load import load_gguf
from hf_ctxopt.weights.gguf_rope import FREQUENCIES, frequency_divisors, rotary_of, scaling_in
from hf_ctxopt.weights.gguf_write import Weight, write_gguf

SMALL = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 96, "max_position_embeddings": 131072,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}


def written(path: Path, family: str, rope: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(family, **SMALL, rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = [
        Weight(name, "Q8_0" if part.dim() > 1 else None, encode(part, "Q8_0") if part.dim() > 1 else part.detach())
        for name, part in model.named_parameters()
    ]
    write_gguf(path, config, weights)
    return config


def converters(config: Any) -> list[float]:
    """What llama.cpp's `convert_hf_to_gguf.py` computes, in its own words."""
    rope = config.rope_parameters
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    old = rope["original_max_position_embeddings"]
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    factors = []
    for freq in freqs.tolist():
        wavelen = 2 * math.pi / freq
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelen - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"high_freq_factor": 3.0}], ids=str)
def test_llama3_is_a_tensor(changes: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = written(path, "llama", {**LLAMA3, **changes})
    reader = gguf.GGUFReader(path)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == FREQUENCIES)
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert tensor.data.shape == (64,)
    torch.testing.assert_close(torch.tensor(tensor.data), torch.tensor(converters(config)), rtol=1e-4, atol=0)
    assert not [key for key in reader.fields if "rope.scaling" in key]

    plain = 1 / (500000.0 ** (torch.arange(0, 128, 2) / 128))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(plain / torch.tensor(tensor.data), scaled, rtol=1e-4, atol=0)

    model, _ = load_gguf(path)
    for key, value in {**LLAMA3, **changes}.items():
        assert model.config.rope_parameters[key] == (value if isinstance(value, str) else pytest.approx(value, 1e-3))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, scaled, rtol=1e-4, atol=0)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, scaled, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("family", "rope"), [("llama", LINEAR), ("qwen2", YARN), ("gemma3_text", LINEAR)])
def test_linear_and_yarn_are_metadata(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    given = rope
    if family == "gemma3_text":
        given = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = written(path, family, given)
    reader = gguf.GGUFReader(path)
    assert FREQUENCIES not in [tensor.name for tensor in reader.tensors]
    name = {"gemma3_text": "gemma3"}.get(family, family)
    held = {key.rpartition(".")[2]: field.contents() for key, field in reader.fields.items() if "rope.scaling" in key}
    assert held.pop("type") == rope["rope_type"]
    assert held.pop("factor") == rope["factor"]
    assert held == ({"original_context_length": 32768} if family == "qwen2" else {})
    assert f"{name}.rope.scaling.type" in reader.fields
    model, _ = load_gguf(path)
    found = rotary_of(model.config)
    assert {key: found[key] for key in rope} == rope
    if family == "gemma3_text":
        assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    want, got = (AutoModelForCausalLM.from_config(kind).model.rotary_emb for kind in (config, model.config))
    for (key, one), (_, other) in zip(want.named_buffers(), got.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=key)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {**YARN, "attention_factor": 1.3},
    ],
    ids=str,
)
def test_what_no_file_holds_is_named(rope: dict[str, Any]) -> None:
    config = AutoConfig.for_model("llama", **SMALL, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match=r"dynamic|attention_factor"):
        rotary_of(config)


def test_other_divisors_and_scalings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    divisors = frequency_divisors(LLAMA3, 128)
    assert divisors is not None
    assert scaling_in({}, "llama", torch.ones(64), 5e5) == {}
    assert not caplog.records
    assert scaling_in({}, "llama", divisors.flip(0), 5e5) == {}
    assert "unscaled" in caplog.text
    caplog.clear()
    assert scaling_in({"llama.rope.scaling.type": "longrope"}, "llama", None, 5e5) == {}
    assert "longrope" in caplog.text
