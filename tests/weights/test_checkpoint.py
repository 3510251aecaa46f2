"""Packed models against checkpoints: fused tensors, other classes, tensors that are missing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, HrmTextConfig, HrmTextForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

import hf_ctxopt
from tests.weights.test_in_situ import IDS, tiny

FUSED = [{"mix": "Q4_K_M"}, {"mix": "Q8_0", "exclude": ["gate_proj"]}, {"mix": "Q8_0"}]


def hrm() -> HrmTextForCausalLM:
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        pad_token_id=0,
    )  # fmt: skip
    return HrmTextForCausalLM(config).eval()


@pytest.mark.parametrize("rules", FUSED, ids=["types that differ", "first part dense", "one type"])
def test_a_fused_tensor_of_parts_that_are_packed_differently(rules: dict[str, Any], tmp_path: Path) -> None:
    hrm().save_pretrained(tmp_path / "dense")
    packed = hf_ctxopt.quantize_(hrm(), **rules)
    want = packed(IDS).logits
    loaded = HrmTextForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig(**rules)
    )
    assert torch.equal(loaded(IDS).logits, want)
    for number, model in enumerate((packed, loaded)):
        model.save_pretrained(tmp_path / str(number))
        again = HrmTextForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(again(IDS).logits, want)
        pickle.dumps(again)
    names = load_file(tmp_path / "0" / "model.safetensors")
    assert any("gqkv_proj" in name for name in names) is (rules == FUSED[2])


def test_a_packed_checkpoint_is_read_by_other_classes(tmp_path: Path) -> None:
    model = hf_ctxopt.quantize_(tiny(False), "Q8_0")
    model.save_pretrained(tmp_path / "head")
    hf_ctxopt.quantize_(tiny(False).model, "Q8_0").save_pretrained(tmp_path / "base")
    want = model.model(IDS).last_hidden_state
    for place in ("head", "base"):
        base = AutoModel.from_pretrained(tmp_path / place)
        assert torch.equal(base(IDS).last_hidden_state, want)
    headed = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(headed.model(IDS).last_hidden_state, want)
    assert set(headed.config.quantization_config.types) == set(model.config.quantization_config.types) - {"lm_head"}
    sorting = LlamaForSequenceClassification.from_pretrained(tmp_path / "head")
    assert type(sorting.score) is torch.nn.Linear


def test_a_checkpoint_without_a_packed_weight_is_refused(tmp_path: Path) -> None:
    hf_ctxopt.quantize_(tiny(False), "Q8_0").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        less = {key: value for key, value in held.items() if key != name}
        save_file(less, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(hf_ctxopt.ConfigError, match=f"1 weights of LlamaForCausalLM: {name}"):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_new_head_is_drawn_only_where_it_stays_dense(tmp_path: Path) -> None:
    tiny(False).save_pretrained(tmp_path)
    config = hf_ctxopt.GgufQuantConfig("Q8_0")
    with pytest.raises(hf_ctxopt.ConfigError, match=r"score\.weight.*exclude"):
        LlamaForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    config = hf_ctxopt.GgufQuantConfig("Q8_0", exclude=["score"])
    model = LlamaForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_weight_that_cannot_be_packed_is_named_while_loading(value: float, tmp_path: Path) -> None:
    model = tiny(False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(hf_ctxopt.ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=hf_ctxopt.GgufQuantConfig("Q8_0"))


def test_weights_on_the_disk(tmp_path: Path) -> None:
    """Packed ones are read from there; dense ones are not packed on their way."""
    model = tiny(False)
    model.save_pretrained(tmp_path / "dense")
    where: dict[str, Any] = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    options = {"device_map": where, "offload_folder": tmp_path / "disk"}
    with pytest.raises(hf_ctxopt.ConfigError, match=r"device_map=.*layers\.1.*disk"):
        LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig("Q8_0"), **options
        )
    hf_ctxopt.quantize_(model, "Q8_0").save_pretrained(tmp_path / "packed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed", **options)
    assert again.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("types", [{"model.norm": "Q8_0"}, {"nothing": "Q8_0"}], ids=str)
def test_types_of_what_is_no_matrix_are_refused(types: dict[str, str], tmp_path: Path) -> None:
    hf_ctxopt.quantize_(tiny(False), "Q8_0").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["types"] = types
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(hf_ctxopt.ConfigError, match=next(iter(types))):
        LlamaForCausalLM.from_pretrained(tmp_path)
