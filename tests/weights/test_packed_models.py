"""The benchmarks' random packed models: no dense matrix is ever made of what is packed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hf_ctxopt.weights.blocks import packed_bytes
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from hf_ctxopt.weights.selection import Choice, types_of

SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


class Made(TorchDispatchMode):
    """Notes the bytes of every uint8 tensor that is drawn, and the largest floating tensor off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type != "meta":
            if "randint" in str(func):
                self.drawn += out.numel()
            elif out.is_floating_point():
                self.largest = max(self.largest, out.numel())
        return out


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
    return importlib.import_module("packed_models")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_built_of_blocks_alone(family: str, script: ModuleType) -> None:
    with torch.device("meta"):
        if family == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
        else:
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=16))
    types = types_of(model, Choice("Q4_K_M"))
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in types}
    with Made() as made:
        built = script.pack_at_random(model, "Q4_K_M", torch.float32, "cpu")
    tied = family == "gemma"
    names = [name for name in types if not (tied and name == "lm_head")]
    assert made.drawn == sum(packed_bytes(shapes[name], types[name]) for name in names)
    assert made.largest <= 512  # norms; a matrix has 256 * 256 and more

    packed = {name: m for name, m in built.named_modules() if isinstance(m, GgufLinear | GgufEmbedding)}
    assert {name: module.block_type for name, module in packed.items()} == types
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    assert not any(part.is_meta for part in [*built.parameters(), *built.buffers()])
    with torch.no_grad():
        logits = built(torch.arange(2, 40).view(1, -1)).logits
    assert logits.isfinite().all()
    assert logits.std() > 1e-4


def test_what_is_kept_is_drawn_dense(script: ModuleType) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    built = script.pack_at_random(model, "Q8_0", torch.bfloat16, "cpu", kept=["lm_head"])
    assert built.lm_head.weight.dtype == torch.bfloat16
    assert 0.01 < built.lm_head.weight.float().std() < 0.03
    assert isinstance(built.model.layers[0].mlp.up_proj, GgufLinear)
