"""An 8 GiB card on a larger GPU, and a model that fits on it: the parts of `fit_8gb.py`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

CARD = 8 << 30
ALLOCATOR, GROWING = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
USUAL_CONTEXT = int(0.669 * 2**30)  # CUDA context outside of the allocator, measured alone on an H200


def with_growing_segments() -> None:
    """Start this program anew with the allocator's setting, which torch reads when it is imported."""
    if not os.environ.get(ALLOCATOR):
        os.environ[ALLOCATOR] = GROWING
        os.execv(sys.executable, [sys.executable, *sys.argv])


def outside() -> int:
    """Bytes of the GPU in use outside of torch's allocator: the CUDA context, and other processes if there are any."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def shrink() -> dict[str, Any]:
    """Cap the allocator at 8 GiB less the context of this process as it is now; returns the figures."""
    context = outside()
    alone = context < 2 * USUAL_CONTEXT
    limit = CARD - (context if alone else USUAL_CONTEXT)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    return {"limit_gib": limit / 2**30, "context_gib": context / 2**30, "context_measured": alone}


def llama_7b(layers: int = 32) -> Any:
    """A random Llama-2-7B shape with `layers` layers, built matrix by matrix.

    Linear layers are nf4 with double quantization; embedding, norms and head are bf16.
    """
    import bitsandbytes as bnb

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            drawn = _normal(module.weight.shape, 0.02)
            packed.weight = bnb.nn.Params4bit(
                drawn, requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to("cuda")  # fmt: skip
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, packed)
    for module in model.modules():
        for key, part in list(module._parameters.items()):
            if part is not None and part.is_meta:
                drawn = torch.ones(part.shape, device="cuda", dtype=torch.bfloat16)
                new = drawn if part.dim() == 1 else _normal(part.shape, 0.02)
                module._parameters[key] = nn.Parameter(new, requires_grad=False)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _normal(shape: torch.Size, scale: float) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(scale)
