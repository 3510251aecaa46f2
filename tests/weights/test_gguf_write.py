"""Files we write: read back bit for bit by `gguf`, by transformers and by ourselves."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ctxopt.errors import ConfigError, UnsupportedModelError
from hf_ctxopt.weights.codecs import decode, encode
from hf_ctxopt.weights.gguf_file import GgufFile
from hf_ctxopt.weights.gguf_names import named_tensors
from hf_ctxopt.weights.gguf_write import Weight, write_gguf
from hf_ctxopt.weights.mixes import tensor_type
from hf_ctxopt.weights.shapes import meta_model, shape_of

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]


def small(family):
    # transformers does not read Qwen3's head size from a file: it must be the default.
    config = AutoConfig.for_model(family, **{**SMALL, "head_dim": 128 if family == "qwen3" else 32})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def packed_weights(model, mix="Q4_K_M"):
    shape = shape_of(model.config)
    for name, parameter in model.named_parameters():
        kind = tensor_type(name, parameter.shape, mix, shape)
        yield Weight(name, kind, parameter.detach() if kind is None else encode(parameter, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    model = small(family)
    for parameter in model.parameters():  # norms that are all one would hide an offset
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    weights = list(packed_weights(model))
    path = write_gguf(tmp_path / "model.gguf", model.config, weights)
    assert [item.name for item in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == len(weights)
    held = {weight.parameter: weight for weight in weights}
    file = GgufFile(path)
    for named in named_tensors(file, meta_model(model.config)):
        weight = held.pop(named.parameter)
        assert named.type == weight.type
        if named.type is not None:
            assert torch.equal(named.data, weight.data), named.parameter
        else:
            torch.testing.assert_close(named.data, weight.data, rtol=0, atol=2e-7)
    assert not held
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert loaded.config.model_type == ("llama" if family == "mistral" else family)
    state = loaded.state_dict()
    for weight in weights:
        values = weight.data if weight.type is None else decode(weight.data, weight.type)
        torch.testing.assert_close(state[weight.parameter], values, rtol=0, atol=2e-7)
        model.get_parameter(weight.parameter).data.copy_(values)
    ids = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_named(tmp_path):
    model = small("llama")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"older")
    with pytest.raises(UnsupportedModelError, match="falcon"):
        write_gguf(path, AutoConfig.for_model("falcon"), [])
    scaled = AutoConfig.for_model("llama", **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                                      "rope_theta": 1e4})  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        write_gguf(path, scaled, [])
    with pytest.raises(UnsupportedModelError, match="model.adapter"):
        write_gguf(path, model.config, [Weight("model.adapter.weight", None, torch.zeros(2, 2))])
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        write_gguf(path, model.config, [Weight("lm_head.weight", "Q8_0", torch.zeros(2, 33, dtype=torch.uint8))])
    assert path.read_bytes() == b"older"
    assert [item.name for item in tmp_path.iterdir()] == ["model.gguf"]
