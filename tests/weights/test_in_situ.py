"""Models packed while they are loaded and in memory, saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

import hf_ctxopt
from hf_ctxopt.weights import in_memory, matmul
from hf_ctxopt.weights.codecs import decode, encode, encode_searched
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from hf_ctxopt.weights.pack_op import PackOp
from hf_ctxopt.weights.quantizer import GgufQuantizer
from hf_ctxopt.weights.selection import expect_


def tiny(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(2, 14).view(1, -1)


def decoded_twin(model: LlamaForCausalLM, packed: torch.nn.Module) -> LlamaForCausalLM:
    """`model` with each packed module's decoded weight."""
    for name, module in packed.named_modules():
        if isinstance(module, GgufLinear | GgufEmbedding):
            model.get_submodule(name).weight.data = module.dequantize()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_packed_while_loaded_saved_and_loaded_again(tied: bool, tmp_path: Path) -> None:
    dense = tiny(tied)
    dense.save_pretrained(tmp_path / "dense")
    config = hf_ctxopt.GgufQuantConfig("Q4_K_M", exclude=["o_proj"], overrides={"up_proj": "Q8_0"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    layer = model.model.layers[0]
    assert (layer.self_attn.q_proj.block_type, layer.mlp.up_proj.block_type) == ("Q4_K", "Q8_0")
    assert type(layer.self_attn.o_proj) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    want = encode(dense.model.layers[0].self_attn.q_proj.weight, "Q4_K")
    assert torch.equal(layer.self_attn.q_proj.weight, want)
    logits = model(IDS).logits
    torch.testing.assert_close(logits, decoded_twin(dense, model)(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again(IDS).logits, logits)


def test_in_memory_equals_in_situ(tmp_path: Path) -> None:
    dense = tiny(True)
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig())
    model = hf_ctxopt.quantize_(dense, "Q4_K_M")
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -70000.0])
def test_weights_that_cannot_be_packed_are_found_first(value: float) -> None:
    model = tiny(True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    with pytest.raises(hf_ctxopt.ConfigError, match="layers.1.mlp.down_proj.*finite"):
        hf_ctxopt.quantize_(model)
    for name, part in model.named_parameters():
        torch.testing.assert_close(part.detach(), before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(isinstance(module, GgufLinear | GgufEmbedding) for module in model.modules())


def test_an_interrupt_leaves_a_dense_rounded_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(True).requires_grad_(False)
    model.model.norm.requires_grad_(True)
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    calls = iter(range(100))

    def stopped(weight: torch.Tensor, type: str) -> torch.Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode_searched(weight, type)

    monkeypatch.setattr(in_memory, "encode_searched", stopped)
    with pytest.raises(KeyboardInterrupt):
        hf_ctxopt.quantize_(model, "Q8_0")
    assert [name for name, part in model.named_parameters() if part.requires_grad] == ["model.norm.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    changed = [name for name, part in model.named_parameters() if not torch.equal(part, before[name])]
    assert len(changed) == 5
    for name in changed:
        want = decode(encode_searched(before[name], "Q8_0"), "Q8_0")
        assert torch.equal(model.get_parameter(name), want)
    assert "5 weights" in caplog.text
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_packed_model_moves_to_another_dtype(dtype: torch.dtype) -> None:
    model = hf_ctxopt.quantize_(tiny(True), "Q8_0")
    want = model(IDS).logits
    blocks = model.model.embed_tokens.weight.clone()
    model.to(dtype)
    assert model.get_input_embeddings()(IDS).dtype is dtype
    assert torch.equal(model.model.embed_tokens.weight, blocks)
    got = model(IDS).logits
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    assert model.to("cpu").get_input_embeddings().dtype is dtype


def test_packed_in_stages(tmp_path: Path) -> None:
    model = hf_ctxopt.quantize_(tiny(True), "Q8_0", include=["mlp"])
    hf_ctxopt.quantize_(model, "Q4_K_M", exclude=["mlp", "o_proj"])
    config = model.config.quantization_config
    assert (config.mix, config.types["model.layers.0.mlp.up_proj"]) == ("Q4_K_M", "Q8_0")
    assert len(config.types) == 14
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    hf_ctxopt.quantize_(again, "Q8_0")  # what is left
    assert len(again.config.quantization_config.types) == 16
    with pytest.raises(hf_ctxopt.ConfigError, match="include"):
        hf_ctxopt.quantize_(again, "Q4_K_M")
    assert len(again.config.quantization_config.types) == 16


def test_rules_that_pack_nothing_are_refused(tmp_path: Path) -> None:
    model = tiny(True)
    model.save_pretrained(tmp_path)
    with pytest.raises(hf_ctxopt.ConfigError, match="include"):
        hf_ctxopt.quantize_(model, include=["nothing"])
    assert getattr(model.config, "quantization_config", None) is None
    config = hf_ctxopt.GgufQuantConfig(include=["nothing"])
    with pytest.raises(hf_ctxopt.ConfigError, match="include"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = tiny(True)
    with pytest.raises(hf_ctxopt.ConfigError, match="meta device"):
        hf_ctxopt.quantize_(model)
    assert not any(isinstance(module, GgufLinear | GgufEmbedding) for module in model.modules())


def test_dequantizing_in_place_is_refused() -> None:
    model = hf_ctxopt.quantize_(tiny(True), "Q8_0")
    with pytest.raises(hf_ctxopt.UnsupportedModelError, match="dense checkpoint"):
        model.dequantize()


def test_a_model_that_something_else_packed_is_refused() -> None:
    model = tiny(True)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(hf_ctxopt.ConfigError, match="hf_ctxopt has packed"):
        hf_ctxopt.quantize_(model)


@pytest.mark.parametrize(
    "options",
    [{"mix": "Q4_K_X"}, {"include": ["("]}, {"exclude": "o_proj"}, {"overrides": {"q_proj": "Q9"}}],
    ids=str,
)
def test_bad_rules_are_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(hf_ctxopt.ConfigError):
        hf_ctxopt.GgufQuantConfig(**options)


def test_gradient_passes_a_packed_weight() -> None:
    packed = encode(torch.randn(8, 64), "Q8_0")
    x = torch.randn(3, 64, requires_grad=True)
    matmul.decoded_matmul(x, packed, "Q8_0").sum().backward()
    torch.testing.assert_close(x.grad, decode(packed, "Q8_0").sum(0).expand(3, -1))


def test_gradient_of_many_slabs_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was rounded to bfloat16 after each slab: six times the error of one product over 64 of them."""
    monkeypatch.setattr(matmul, "SLAB_CPU", 64)
    torch.manual_seed(0)
    packed, grad = encode(torch.randn(256, 64), "Q8_0"), torch.randn(4, 256).bfloat16()
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    matmul.gguf_matmul(x, packed, "Q8_0").backward(grad)
    want = grad.double() @ decode(packed, "Q8_0", torch.bfloat16).double()
    assert x.grad.dtype == torch.bfloat16
    assert float((x.grad - want).norm() / want.norm()) < 0.005


def test_float64_is_not_rounded_to_float32() -> None:
    packed, x = encode(torch.randn(8, 64), "Q8_0"), torch.randn(2, 64, dtype=torch.float64)
    want = x @ decode(packed, "Q8_0", torch.float64).T
    torch.testing.assert_close(matmul.gguf_matmul(x, packed, "Q8_0"), want, rtol=0.0, atol=1e-12)


def test_flat_types_are_searched() -> None:
    """A weight that was on a 4-bit grid once is on a 5-bit one: plain rounding to a block's range misses it."""
    grid = decode(encode(torch.randn(16, 64), "Q4_1"), "Q4_1")
    assert float((decode(encode(grid, "Q5_1"), "Q5_1") - grid).norm() / grid.norm()) > 0.01
    found = decode(encode_searched(grid, "Q5_1"), "Q5_1")
    assert float((found - grid).norm() / grid.norm()) < 0.01
    model = tiny(False)
    down = model.model.layers[0].mlp.down_proj.weight.detach().clone()  # 288 columns: Q5_1 stands in for Q5_K
    hf_ctxopt.quantize_(model, "Q5_K_M", include=["down_proj"])
    packed = model.model.layers[0].mlp.down_proj
    assert torch.equal(packed.weight, encode_searched(down, packed.block_type))


def test_a_model_without_a_dense_weight_keeps_its_dtype(tmp_path: Path) -> None:
    """OLMo's norms have no weights: `model.dtype` ended in StopIteration, and saving with it."""
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = OlmoForCausalLM(config).eval().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    model = hf_ctxopt.quantize_(OlmoForCausalLM.from_pretrained(tmp_path / "dense"), "Q8_0")
    assert model.dtype is torch.bfloat16
    model.save_pretrained(tmp_path / "packed")
    again = OlmoForCausalLM.from_pretrained(tmp_path / "packed")
    loaded = OlmoForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig("Q8_0"))
    for other in (again, loaded):
        assert other.dtype is torch.bfloat16
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert not any("dtype" in name for name in model.state_dict())
    again.load_state_dict(model.state_dict())
    assert again.to(torch.float16).dtype is torch.float16


def test_a_first_parameter_of_another_dtype_is_not_the_model_s(tmp_path: Path) -> None:
    model = tiny(False).to(torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    hf_ctxopt.quantize_(model, "Q8_0")
    assert model.dtype is torch.bfloat16
    model.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.dtype is torch.bfloat16


def test_a_fused_tensor_of_a_checkpoint_is_packed_part_by_part() -> None:
    """transformers hands over all that it cut one tensor into (HRM's and Molmo's projections, Dinov2's)."""
    model = tiny(False)
    expect_(model, {"model.layers.0.mlp.gate_proj": "Q8_0"}, torch.float32, packed=False)
    gate, up = torch.randn(2, 288, 256).unbind()
    stem = "model.layers.0.mlp"
    op = PackOp(GgufQuantizer(hf_ctxopt.GgufQuantConfig("Q8_0")))
    got = op.convert(
        {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": [up]},
        model=model, full_layer_name=f"{stem}.gate_proj.weight",
    )  # fmt: skip
    assert torch.equal(got[f"{stem}.gate_proj.weight"], encode(gate, "Q8_0"))
    assert torch.equal(got[f"{stem}.up_proj.weight"], up)
