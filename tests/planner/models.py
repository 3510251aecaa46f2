"""Six models people run, by their configs (`benchmarks/models.json`), and what is published of them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ctxopt.planner.facts import ModelFacts, facts_of

GIB = 1 << 30
MODELS = Path(__file__).resolve().parents[2] / "benchmarks" / "models.json"
CONFIGS: dict[str, dict[str, Any]] = json.loads(MODELS.read_text(encoding="utf-8"))


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
        CONFIGS["Llama-2-7B"], 6_738_415_616, 4096, {"Q8_0": 7.16, "Q6_K": 5.53, "Q5_K_M": 4.78, "Q4_K_M": 4.08},
        2 * 32 * 32 * 128 * 2, 32 * 32 * _head_page(128),
    ),
    "Llama-3.1-8B": Known(
        CONFIGS["Llama-3.1-8B"], 8_030_261_248, 131072, {"Q8_0": 8.54, "Q6_K": 6.60, "Q5_K_M": 5.73, "Q4_K_M": 4.92},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
    "Mistral-7B": Known(
        CONFIGS["Mistral-7B"], 7_248_023_552, 32768, {"Q8_0": 7.70, "Q6_K": 5.95, "Q5_K_M": 5.14, "Q4_K_M": 4.37},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
    "Qwen3-8B": Known(
        CONFIGS["Qwen3-8B"], 8_190_735_360, 40960, {"Q8_0": 8.71, "Q6_K": 6.73, "Q5_K_M": 5.85, "Q4_K_M": 5.03},
        2 * 36 * 8 * 128 * 2, 36 * 8 * _head_page(128),
    ),
    "Gemma-3-12B": Known(
        CONFIGS["Gemma-3-12B"], 11_766_034_176, 131072, {"Q8_0": 12.5, "Q6_K": 9.66, "Q5_K_M": 8.45, "Q4_K_M": 7.30},
        2 * 8 * 8 * 256 * 2, 8 * 8 * _head_page(256),
    ),
    "Phi-4-mini": Known(
        CONFIGS["Phi-4-mini"], 3_836_021_760, 131072, {"Q8_0": 4.08, "Q6_K": 3.16, "Q5_K_M": 2.85, "Q4_K_M": 2.49},
        2 * 32 * 8 * 128 * 2, 32 * 8 * _head_page(128),
    ),
}  # fmt: skip


@functools.cache
def facts(name: str) -> ModelFacts:
    """Facts of a model of `KNOWN`, read once."""
    return facts_of(KNOWN[name].config)
