"""Model shapes with random GGUF blocks, drawn where they are to run: the parts of `weights.py`.

Nothing is encoded and no dense matrix is ever made, so a model is built on a card that only its packed weights fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hf_ctxopt.weights.blocks import BLOCKS
from hf_ctxopt.weights.selection import Choice, replacement, types_of

# Type -> (byte of an fp16 factor, its value): weights of about 0.02.
FACTORS = {
    "Q4_K": ((0, 1.4e-4), (2, 1.05e-3)), "Q5_K": ((0, 7e-5), (2, 1.05e-3)), "Q6_K": ((208, 1.5e-5),),
    "Q8_0": ((0, 2.7e-4),), "Q4_0": ((0, 4.3e-3),), "Q4_1": ((0, 4.3e-3), (2, -3.2e-2)), "Q5_0": ((0, 2.2e-3),),
    "Q5_1": ((0, 2.2e-3), (2, -3.4e-2)),
}  # fmt: skip


def random_blocks(rows: int, columns: int, type: str, device: Any = "cuda") -> torch.Tensor:
    """uint8 (rows, bytes of a row) on `device`: random codes, factors of a usual size."""
    row = BLOCKS[type]
    packed = torch.randint(0, 256, (rows, columns // row.block, row.nbytes), dtype=torch.uint8, device=device)
    for place, value in FACTORS[type]:
        packed[..., place : place + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8).to(device)
    return packed.view(rows, -1)


def pack_at_random(model: Any, mix: str, dtype: torch.dtype, device: Any = "cuda", kept: Sequence[str] = ()) -> Any:
    """A model on the meta device, filled: blocks where `mix` packs, ones and small normals elsewhere.

    Beside the packed model nothing is held but one matrix at a time: a tied head shares the embedding's blocks from
    the start (of Gemma-3-12B they are 0.77 GiB, which an 8 GiB card has not got twice).

    Args:
        model: its parameters are on the meta device.
        mix: key of `MIXES`.
        dtype: of what is not packed, and of the embedding's result.
        device: where the weights go.
        kept: patterns of modules that are not packed.
    """
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # a buffer, which has no value on the meta device
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    blocks: dict[int, nn.Parameter] = {}  # by the id of the meta weight, which the list keeps alive
    weights: list[nn.Parameter] = []
    for name, type in types_of(model, Choice(mix, exclude=kept)).items():
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = replacement(old, type, dtype, packed=True)
        if id(old.weight) not in blocks:
            weights.append(old.weight)
            drawn = random_blocks(*old.weight.shape, type, device)
            blocks[id(old.weight)] = nn.Parameter(drawn, requires_grad=False)
        new.weight = blocks[id(old.weight)]
        model.set_submodule(name, new)
    for module in model.modules():
        for key, part in list(module._parameters.items()):
            if part is not None and part.is_meta:
                new = torch.empty(part.shape, device=device, dtype=dtype)
                new.fill_(1.0) if part.dim() == 1 else new.normal_(0, 0.02)
                module._parameters[key] = nn.Parameter(new, requires_grad=False)
    model.tie_weights()
    with torch.device(device):
        model.model.rotary_emb = type_of(model.model.rotary_emb)(model.config)
    return model.eval()


def type_of(module: Any) -> Any:
    """The class of a module (the name `type` means a block type here)."""
    return module.__class__


def llama_7b_config(layers: int = 32) -> LlamaConfig:
    """Llama-2-7B's shape."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip


def packed_llama_7b(mix: str = "Q4_K_M", layers: int = 32, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Llama-2-7B's shape in `mix`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_7b_config(layers)).to(dtype)
    return pack_at_random(model, mix, dtype)


def packed_gemma_12b(mix: str = "Q4_K_M", layers: int = 48, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Gemma-3-12B's text model in `mix`: a tied embedding of 262,208 tokens, five sliding layers to a full one."""
    config = Gemma3TextConfig(
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, sliding_window=1024, max_position_embeddings=131072, eos_token_id=None,
        query_pre_attn_scalar=256,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config).to(dtype)
    return pack_at_random(model, mix, dtype)
