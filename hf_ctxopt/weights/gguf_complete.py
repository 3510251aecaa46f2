"""What transformers does not read from a `.gguf` file's metadata, put into the config; and files it would misread."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .gguf_file import GgufFile

_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}

# llama.cpp, `src/models/gemma2.cpp` and `gemma3.cpp`: files do not hold the scale of the scores, and those of the 27B
# models, known by their layers, is another than the others'.
WIDE_SCALE = (("gemma2", 46), ("gemma3", 62))


def refuse(file: GgufFile) -> None:
    """Raises `UnsupportedModelError` for a sound file that transformers would read as another model."""
    place = file.header.path
    if file.architecture == "llama" and file.metadata.get("llama.expert_count"):
        raise UnsupportedModelError(f"{place}: a llama with experts (Mixtral) is not loaded packed")
    if "rope_factors_long.weight" in file.tensors:
        raise UnsupportedModelError(f"{place}: the factors of its long-context rotation (longrope) are not read")


def complete(file: GgufFile, text: Any) -> None:
    """Put what the file holds, or says by what it holds, into the text config.

    Args:
        file: an open file.
        text: transformers' config of it, changed in place.
    """

    def said(key: str) -> Any:
        return file.metadata.get(f"{file.architecture}.{key}")

    for key, name in _WIDTHS.items():
        if said(key) and hasattr(text, name):
            setattr(text, name, said(key))
    if file.architecture in ("qwen3", "nemotron") and said("attention.key_length"):
        text.head_dim = said("attention.key_length")
    if file.architecture == "llama":
        text.attention_bias = "blk.0.attn_output.bias" in file.tensors
        text.mlp_bias = "blk.0.ffn_down.bias" in file.tensors
    if file.architecture == "phi3":
        text.sliding_window = said("attention.sliding_window") or None
        if rotated := said("rope.dimension_count"):
            share = rotated / (text.hidden_size // text.num_attention_heads)
            text.rope_parameters = {**text.rope_parameters, "partial_rotary_factor": share}
    if (file.architecture, text.num_hidden_layers) in WIDE_SCALE:
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads
