"""Mixtures, whose experts are two parameters of three dimensions, are packed like everything else."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.schemes import weight_bytes
from hf_ctxopt.weights import selection
from hf_ctxopt.weights.experts import PARTS, GgufExperts, is_experts
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from hf_ctxopt.weights.selection import Choice, types_of

BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
IDS = torch.arange(2, 26).view(1, -1)
FAMILIES = ("mixtral", "qwen2_moe")


def mixture(family: str) -> Any:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**BASE, intermediate_size=256, num_local_experts=4)).eval()
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **BASE,
            intermediate_size=256,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
            num_experts=4,
        )
    ).eval()


def twin(dense: Any, packed: Any) -> Any:
    """The dense model with the decoded weights of the packed one."""
    dense = copy.deepcopy(dense)
    for name, module in packed.named_modules():
        if isinstance(module, GgufLinear | GgufEmbedding):
            dense.get_submodule(name).weight.data = module.dequantize()
        elif isinstance(module, GgufExperts):
            for part in PARTS:
                getattr(dense.get_submodule(name), part).data = module.dequantize(part)
    return dense


def experts_of(model: Any) -> list[GgufExperts]:
    return [module for module in model.modules() if isinstance(module, GgufExperts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_situ_in_memory_saved_and_loaded_again(family: str, tmp_path: Path) -> None:
    dense = mixture(family)
    dense.save_pretrained(tmp_path / "dense")
    config = hf_ctxopt.GgufQuantConfig("Q4_K_M", exclude=["q_proj"], overrides={r"layers\.1.*experts": "Q8_0"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    first, second = experts_of(model)
    assert first.block_types["gate_up_proj"] == "Q4_K"
    assert second.block_types == dict.fromkeys(PARTS, "Q8_0")
    assert first.gate_up_proj.dtype == torch.uint8
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    logits = model(IDS).logits
    torch.testing.assert_close(logits, twin(dense, model)(IDS).logits, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, logits)

    memory = hf_ctxopt.quantize_(dense, "Q4_K_M", exclude=["q_proj"], overrides={r"layers\.1.*experts": "Q8_0"})
    assert torch.equal(memory(IDS).logits, logits)
    memory.save_pretrained(tmp_path / "memory")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_the_planners(family: str) -> None:
    model = mixture(family).to(torch.bfloat16)
    planned = weight_bytes(facts_of(model.config), "Q4_K_M")
    hf_ctxopt.quantize_(model, "Q4_K_M")
    assert sum(part.numel() * part.element_size() for part in model.parameters()) == planned.total
    experts = sum(module.gate_up_proj.numel() + module.down_proj.numel() for module in experts_of(model))
    assert experts > 0.3 * planned.total


def test_patterns_reach_single_parameters() -> None:
    model = mixture("mixtral")
    found = types_of(model, Choice("Q6_K", include=[r"experts\.down_proj"]))
    assert sorted(found) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
    hf_ctxopt.quantize_(model, "Q6_K", include=[r"experts\.down_proj"])
    first = experts_of(model)[0]
    assert first.gate_up_proj.dtype == torch.float32
    assert first.down_proj.dtype == torch.uint8
    assert model(IDS).logits.isfinite().all()
    with pytest.raises(ConfigError, match="columns"):
        hf_ctxopt.quantize_(
            MixtralForCausalLM(MixtralConfig(**BASE, intermediate_size=96, num_local_experts=2)),
            overrides={r"experts\.down_proj": "Q4_K"},
        )


def test_a_failure_gives_the_dense_experts_back() -> None:
    model = mixture("qwen2_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")
    names = {name: tuple(part.shape) for name, part in model.named_parameters()}
    with pytest.raises(ConfigError, match="finite"):
        hf_ctxopt.quantize_(model, "Q8_0")
    assert not experts_of(model)
    assert {name: tuple(part.shape) for name, part in model.named_parameters()} == names
    assert is_experts(model.model.layers[0].mlp.experts)


def test_packed_experts_generate_with_pages() -> None:
    model = hf_ctxopt.quantize_(mixture("qwen2_moe"), "Q8_0")
    want = model.generate(IDS, max_new_tokens=8, do_sample=False)
    hf_ctxopt.patch_model(model, "ctx_paged")
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), want)


def test_other_layouts_stay_dense_and_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixture("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True
    monkeypatch.setattr(selection, "LARGE", 1)
    with caplog.at_level(logging.WARNING):
        hf_ctxopt.quantize_(model, "Q8_0")
    assert not experts_of(model)
    assert "stay dense" in caplog.text
    assert "experts.gate_up_proj" in caplog.text
