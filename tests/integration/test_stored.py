"""Checkpoints whose config says that they are packed: what is planned is what is loaded, or it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_ctxopt
from hf_ctxopt import ConfigError, UnsupportedModelError
from hf_ctxopt.integration import load, packing
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.weights.linear import GgufLinear
from hf_ctxopt.weights.stored import stored_scheme
from tests.cli.tiny import save_tiny

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose linear layers are stored in fp8 with a scale for each block, and their values."""
    folder = save_tiny(tmp_path_factory.mktemp("fp8"))
    file, stored, values = folder / "model.safetensors", {}, {}
    for name, tensor in load_file(file).items():
        values[name] = tensor
        if "proj" not in name:
            stored[name] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        blocks = tensor.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        stored[name] = (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    return folder, values


@pytest.mark.parametrize("scheme", ["bf16", "Q8_0"])
def test_fp8_is_unpacked_as_planned(fp8: tuple[Path, dict[str, Tensor]], scheme: str) -> None:
    folder, values = fp8
    made = hf_ctxopt.plan(folder, vram="4GiB", weights=scheme)
    assert any("stored as fp8: unpacked to 16 bits" in reason for reason in made.reasons)
    model, _ = hf_ctxopt.load(made, "cpu")
    held = sum(part.nbytes for part in {id(part): part for part in model.parameters()}.values())
    assert held == made.bytes["weights"] + made.bytes["embeddings"]
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, GgufLinear) is (scheme == "Q8_0")
    if scheme == "bf16":
        torch.testing.assert_close(
            layer.weight.float(), values["model.layers.0.mlp.up_proj.weight"].float(), rtol=0.08, atol=1e-3
        )


def test_fp8_is_packed_by_nothing_that_packs_while_loading(
    fp8: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (load, packing):
        monkeypatch.setattr(room, "check_other", lambda name, device: None)  # as if the packages were there
    monkeypatch.setattr(load, "loading_config", lambda *args: object())
    with pytest.raises(ConfigError, match="packed in memory"):
        hf_ctxopt.plan(fp8[0], vram="4GiB", weights=["bf16", "int8"])
    assert hf_ctxopt.plan(fp8[0], vram="4GiB", weights="hqq4").weights == "hqq4"
    with pytest.raises(ConfigError, match="unpacked first"):
        hf_ctxopt.load(replace(hf_ctxopt.plan(fp8[0], vram="4GiB"), weights="int8"), "cpu")


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "bitnet"}, {"quant_method": "compressed-tensors"}, {"quant_method": "gptq", "bits": 8},
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}}, {"quant_method": "fbgemm_fp8"},
    ],
)  # fmt: skip
def test_bytes_that_are_not_known_are_not_made_up(stored: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"stored as {stored['quant_method']}"):
        facts_of({**TINY, "quantization_config": stored})
    text = {**TINY, "quantization_config": stored}
    with pytest.raises(UnsupportedModelError, match="stored as"):  # of the text part
        facts_of({"model_type": "llava", "text_config": text, "vision_config": {"model_type": "clip_vision_model"}})


@pytest.mark.parametrize(
    ("stored", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8}}}, "hqq8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, "torchao-int8"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "torchao-int4"),
        ({"quant_method": "gguf"}, None), (None, None),
    ],
)  # fmt: skip
def test_the_scheme_of_a_checkpoint(stored: dict[str, Any] | None, scheme: str | None) -> None:
    assert stored_scheme(stored) == scheme
    assert facts_of({**TINY, "quantization_config": stored} if stored else TINY).stored == scheme
