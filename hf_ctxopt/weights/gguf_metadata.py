"""A model's config as GGUF metadata: the reverse of the table by which transformers reads it."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UnsupportedModelError
from .gguf_complete import WIDE_SCALE
from .gguf_rope import rotary_of, scaling_metadata
from .upstream import config_keys

logger = logging.getLogger(__name__)

# transformers' model type -> (llama.cpp's architecture, transformers' name of the table's row). In these the values
# are llama.cpp's but for the order of q and k rows (llama, mistral) and norms stored plus one (gemma). A Mistral is a
# llama to llama.cpp, and transformers reads it back as one: without its sliding window.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "llama"),
    "mistral": ("llama", "mistral"),
    "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen3"),
    "qwen3_moe": ("qwen3moe", "qwen3_moe"),
    "gemma2": ("gemma2", "gemma2"),
    "gemma3_text": ("gemma3", "gemma3"),
    "phi3": ("phi3", "phi3"),
}
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
ROTATED = ("llama", "mistral")
PLUS_ONE = ("gemma2", "gemma3_text")


def family_of(config: Any) -> str:
    """Model type of `config` if it can be written. Raises `UnsupportedModelError` naming those that can."""
    family = str(config.model_type)
    if family not in ARCHITECTURES:
        raise UnsupportedModelError(f"no .gguf is written for {family}; written are {', '.join(ARCHITECTURES)}")
    return family


def metadata_of(config: Any) -> dict[str, Any]:
    """Metadata keys (with their architecture) and values of a text config.

    Raises:
        UnsupportedModelError: an architecture that is not written, or a scaling of the rotary embedding that no file
            can hold.
        CompatibilityError: transformers' table is gone.
    """
    family = family_of(config)
    architecture, row = ARCHITECTURES[family]
    _refuse_unwritten(config, family, architecture)
    rotary = rotary_of(config)
    found: dict[str, Any] = {}
    for key, name in config_keys()[row].items():
        if name is None:
            continue
        value = rotary["rope_theta"] if name == "rope_theta" else getattr(config, name, None)
        if value is not None:
            found[f"{architecture}.{key}"] = value
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # What llama.cpp wants besides; transformers ignores it where it is not in its table.
    found[f"{architecture}.rope.dimension_count"] = rotated_channels(config)
    found.update(scaling_metadata(rotary, architecture))
    found[f"{architecture}.attention.key_length"] = found[f"{architecture}.attention.value_length"] = head
    for key, name in TOKENS.items():
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and token >= 0:  # some configs say "none" by -1
            found[key] = token
    if family == "qwen3_moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1 or not config.norm_topk_prob:
            what = "with layers without experts, or shares of experts that do not sum to one"
            raise UnsupportedModelError(f"no .gguf is written for a {family} {what}")
        found[f"{architecture}.expert_feed_forward_length"] = config.moe_intermediate_size
    if getattr(config, "sliding_window", None):
        found[f"{architecture}.attention.sliding_window"] = config.sliding_window
    return found


def _refuse_unwritten(config: Any, family: str, architecture: str) -> None:
    """Raises `UnsupportedModelError` for settings that no file holds and that would be read back as others."""
    for name in ("use_sliding_window", *(() if architecture == "llama" else ("attention_bias",))):
        if getattr(config, name, False):
            raise UnsupportedModelError(f"no .gguf is written for a {family} with {name}")
    usual = type(config)(num_hidden_layers=config.num_hidden_layers)
    for name in ("hidden_act", "hidden_activation", "layer_types"):
        value = getattr(config, name, None)
        if value != getattr(usual, name, None):
            raise UnsupportedModelError(f"no .gguf is written for a {family} with {name}={value}: no file holds it")
    scale = getattr(config, "query_pre_attn_scalar", None)
    wide = (architecture, config.num_hidden_layers) in WIDE_SCALE
    read_back = config.hidden_size // config.num_attention_heads if wide else 256
    if scale is not None and scale != read_back:
        raise UnsupportedModelError(
            f"no .gguf is written for a {family} with query_pre_attn_scalar={scale}: it would be read as {read_back}"
        )
    head = getattr(config, "head_dim", None)
    if scale is not None and not wide and head != scale:
        logger.warning(
            "llama.cpp scales a %s's scores by its head size, %s, and not by %s as here", family, head, scale
        )
    if family == "mistral" and getattr(config, "sliding_window", None):
        logger.warning("a Mistral is a llama in a .gguf file: its sliding window is not read back")


def rotated_channels(config: Any) -> int:
    """Channels of a head that are rotated."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * (rotary_of(config).get("partial_rotary_factor") or 1.0))
