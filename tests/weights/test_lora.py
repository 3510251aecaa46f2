"""PEFT's LoRA over packed linears: forward, a step of training, merging."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
import peft
from transformers import LlamaForCausalLM

import hf_ctxopt
from hf_ctxopt.weights.linear import GgufLinear
from hf_ctxopt.weights.lora import packed_lora
from tests.weights.test_in_situ import IDS, decoded_twin, tiny


def adapted(packed: bool, marked: bool = False) -> tuple[torch.nn.Module, LlamaForCausalLM]:
    """A model with adapters that do something, packed or dense with the same weights; and the model inside."""
    model = hf_ctxopt.quantize_(tiny(False), "Q8_0")
    if not packed:
        model = decoded_twin(tiny(False), model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, packed_lora(config) if marked else config), model


@pytest.mark.parametrize("marked", [False, True])
def test_forward_and_a_training_step(marked: bool) -> None:
    (ours, model), (dense, _) = adapted(True, marked), adapted(False)
    blocks = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert blocks
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (ours, dense)]
    for _ in range(2):
        losses = [m(IDS, labels=IDS).loss for m in (ours, dense)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    theirs = dict(dense.named_parameters())
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(p, blocks[name]) for name, p in model.named_parameters() if name in blocks)


@torch.no_grad()
def test_merging_in_place_is_refused_and_unloading_dequantizes() -> None:
    ours, model = adapted(True, marked=True)
    want = ours(IDS).logits
    with pytest.raises(hf_ctxopt.UnsupportedModelError, match="merge_and_unload"):
        ours.merge_adapter()
    torch.testing.assert_close(ours(IDS).logits, want)
    merged = ours.merge_and_unload()
    layer = merged.model.layers[0]
    assert type(layer.self_attn.q_proj) is torch.nn.Linear
    assert isinstance(layer.self_attn.k_proj, GgufLinear)
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plain_config_refuses_to_merge_clearly() -> None:
    ours, model = adapted(True)
    want = ours(IDS).logits
    for merge in (ours.merge_adapter, ours.merge_and_unload, lambda: ours.merge_and_unload(safe_merge=True)):
        with pytest.raises(hf_ctxopt.UnsupportedModelError, match="packed_lora"):
            merge()
    assert torch.equal(ours(IDS).logits, want)
    plain = ours.unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, GgufLinear)
    dense, _ = adapted(False)
    want = dense(IDS).logits
    torch.testing.assert_close(dense.merge_and_unload()(IDS).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unloading_gives_the_packed_model_back() -> None:
    ours, model = adapted(True, marked=True)
    with ours.disable_adapter():
        want = ours(IDS).logits
    assert not torch.equal(ours(IDS).logits, want)
    plain = ours.unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, GgufLinear)
    assert torch.equal(plain(IDS).logits, want)


def test_a_model_with_adapters_is_not_packed() -> None:
    """Neither through PEFT's wrapper nor as the model inside: its adapters are linears like others."""
    inside = tiny(False)
    wrapped = peft.get_peft_model(inside, peft.LoraConfig(r=32, target_modules=["q_proj"]))
    for model in (wrapped, inside):
        with pytest.raises(hf_ctxopt.ConfigError, match="pack it first"):
            hf_ctxopt.quantize_(model, "Q8_0")
    assert all(part.dtype != torch.uint8 for part in wrapped.parameters())
    assert sum(part.requires_grad for part in wrapped.parameters()) == 4
    hf_ctxopt.quantize_(wrapped.unload(), "Q8_0")
