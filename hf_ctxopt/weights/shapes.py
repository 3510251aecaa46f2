"""The shapes of a model's weights, and what the mixes' rules look at, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..models.layerwise import largest
from .mixes import Shape


def shape_of(config: Any) -> Shape:
    """The rules' view of a transformers config (the text part of a multimodal one)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((count for key in named if (count := largest(config, key))), 1)
    layers = int(config.num_hidden_layers)
    heads, groups = largest(config, "num_attention_heads"), largest(config, "num_key_value_heads")
    family = str(getattr(config, "model_type", ""))
    return Shape(
        layers=layers,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        experts=experts,
        falcon=family == "falcon",
        # llama.cpp calls these 70B: a llama of 80 layers (`llama-model.cpp`).
        large_gqa=family == "llama" and layers == 80 and 0 < 4 * groups <= heads,
    )


def meta_model(config: Any) -> nn.Module:
    """A language model of `config`, which may read images or sound too, whose parameters take no memory.

    Raises:
        UnsupportedModelError: transformers has no model of that type that generates text.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
    )

    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    # The decoder of some of these is a causal model of its own: it comes second.
    kinds.insert(0 if getattr(config, "is_encoder_decoder", False) else len(kinds), AutoModelForSeq2SeqLM)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None and not hasattr(config, "auto_map"):
        raise UnsupportedModelError(f"{config.model_type}: transformers has no model of that type that generates text")
    with torch.device("meta"):
        model: nn.Module = (kind or AutoModelForCausalLM).from_config(config)
    return model


def weights_of(model: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """(name, shape (..., columns)) of every parameter once; GPT-2's transposed `Conv1D` as its linear."""
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        yield name, shape[::-1] if id(parameter) in transposed else shape
