"""Six models people run, by their configs, and what is published of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from hf_ctxopt.planner.facts import ModelFacts, facts_of

GIB = 1 << 30


@dataclass(frozen=True)
class Known:
    """Published facts of one model.

    Args:
        config: of the model, as `AutoConfig.for_model` takes it.
        parameters: weights in all, a tied head once.
        trained: tokens it was trained on.
        gguf: GB of its files, by mix (their metadata included).
        token_bytes: bytes of K and V of a token in bf16, full-attention layers only.
        page_bytes: bytes of a page of 32 tokens of these at 8 bits, scales included; worked out below.
    """

    config: dict[str, Any]
    parameters: int
    trained: int
    gguf: dict[str, float]
    token_bytes: int
    page_bytes: int


def _head_page(dim: int) -> int:
    """A head's page at 8 bits: 32 tokens of K and V, and 4 bytes of scale and zero per channel of K and token of V."""
    return 32 * dim + 4 * dim + 32 * dim + 4 * 32


KNOWN = {
    "Llama-2-7B": Known(
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
        },
        6_738_415_616, 4096, {"Q8_0": 7.16, "Q6_K": 5.53, "Q5_K_M": 4.78, "Q4_K_M": 4.08},
        2 * 32 * 32 * 128 * 2, 32 * 32 * _head_page(128),
    ),
    "Llama-3.1-8B": Known(
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        8_030_261_248, 131072, {"Q8_0": 8.54, "Q6_K": 6.60, "Q5_K_M": 5.73, "Q4_K_M": 4.92},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
    "Mistral-7B": Known(
        {
            "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
            "max_position_embeddings": 32768, "tie_word_embeddings": False,
        },
        7_248_023_552, 32768, {"Q8_0": 7.70, "Q6_K": 5.95, "Q5_K_M": 5.14, "Q4_K_M": 4.37},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
    "Qwen3-8B": Known(
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40960, "tie_word_embeddings": False,
        },
        8_190_735_360, 40960, {"Q8_0": 8.71, "Q6_K": 6.73, "Q5_K_M": 5.85, "Q4_K_M": 5.03},
        2 * 36 * 8 * 128 * 2, 36 * 8 * _head_page(128),
    ),
    "Gemma-3-12B": Known(
        {
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
            "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "max_position_embeddings": 131072, "sliding_window": 1024, "tie_word_embeddings": True,
        },
        11_766_034_176, 131072, {"Q8_0": 12.5, "Q6_K": 9.66, "Q5_K_M": 8.45, "Q4_K_M": 7.30},
        2 * 8 * 8 * 256 * 2, 8 * 8 * _head_page(256),
    ),
    "Phi-4-mini": Known(
        {
            "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75, "pad_token_id": 199999, "bos_token_id": 199999, "eos_token_id": 199999,
        },
        3_836_021_760, 131072, {"Q8_0": 4.08, "Q6_K": 3.16, "Q5_K_M": 2.85, "Q4_K_M": 2.49},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
}  # fmt: skip


@functools.cache
def facts(name: str) -> ModelFacts:
    """Facts of a model of `KNOWN`, read once."""
    return facts_of(KNOWN[name].config)
