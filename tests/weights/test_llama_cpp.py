"""llama.cpp on files that `save_gguf` writes: the logits and tokens of transformers. Needs llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ctxopt
from tests.weights.test_gguf_save import TEXT, trained
from tests.weights.test_gguf_write import SMALL

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, built from its sources")

WIDE = {"head_dim": 256, "num_attention_heads": 4, "num_hidden_layers": 7, "sliding_window": 8}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "llama3": ("llama", {"rope_parameters": SCALED, "tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {"sliding_window": None}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {"head_dim": 128}),
    "mixture": ("qwen3_moe", {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
                              "norm_topk_prob": True, "head_dim": 128}),
    "gemma2": ("gemma2", WIDE), "gemma3": ("gemma3_text", WIDE), "phi3": ("phi3", {"pad_token_id": 0}),
}  # fmt: skip


@pytest.mark.parametrize("mix", [None, "Q4_K_M", "Q6_K"])
@pytest.mark.parametrize("name", MODELS)
def test_it_says_the_same(name: str, mix: str | None, tmp_path: Path) -> None:
    family, own = MODELS[name]
    config = AutoConfig.for_model(family, **{**SMALL, "vocab_size": 400, "pad_token_id": -1, **own})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms that are all one would hide an offset
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    if mix is not None:
        hf_ctxopt.quantize_(model, mix)
    tokenizer = trained(byte_level=family in ("qwen2", "qwen3", "qwen3_moe", "phi3"))
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf", tokenizer)
    other = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
    ids = list(range(5, 37))
    other.eval(ids)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    error = torch.from_numpy(np.array(other.scores[: len(ids)])) - want
    # It keeps K and V in 16 bits, and rounds activations to 8 where weights are packed.
    assert float(error.norm() / want.norm()) < (0.003 if mix is None else 0.05)
    assert other.tokenize(TEXT.encode(), add_bos=False) == tokenizer(TEXT, add_special_tokens=False).input_ids
    other.close()
