"""The mixes: which block type each tensor of a model gets, by llama.cpp's rules.

A mix (Q4_K_M …) has a base type and raises the tensors that quality hangs on: the head, and `attn_v` and `ffn_down`
of some layers. Source: llama.cpp `src/llama-quant.cpp`, `llama_tensor_get_type_impl` and `tensor_type_fallback`, as
vendored by llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .blocks import BLOCKS
from .roles import Role, kept, layer_of, role

# Mix -> base type.
MIXES: dict[str, str] = {
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
}
# For columns that are no multiple of 256: types of 32 that cost about one bit more.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_VALUES = (Role.V, Role.QKV, Role.KV_B)  # llama.cpp counts fused projections among the values


@dataclass(frozen=True)
class Shape:
    """What the rules look at of a model.

    Args:
        layers: number of decoder layers.
        tied: the head is the embedding's tensor.
        experts: experts per layer; 1 for a dense model. The rules know 8 (Mixtral).
        falcon: the model is a Falcon, whose head and down projections have rules of their own.
        large_gqa: Llama-2/3-70B: 80 layers, 8 query heads per key/value head.
    """

    layers: int
    tied: bool = False
    experts: int = 1
    falcon: bool = False
    large_gqa: bool = False


def more_bits(layer: int, layers: int) -> bool:
    """First and last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def base_type(mix: str) -> str:
    """Base type of `mix`. Raises `ConfigError` for another name."""
    if mix not in MIXES:
        raise ConfigError("mix", mix, ", ".join(MIXES))
    return MIXES[mix]


def fitting_type(type: str, columns: int) -> str | None:
    """`type`, or what replaces it where `columns` is no multiple of its block; `None` where none fits (keep F16)."""
    if columns % BLOCKS[type].block == 0:
        return type
    fallback = FALLBACK.get(type)
    return fallback if fallback is not None and columns % BLOCKS[fallback].block == 0 else None


def tensor_type(name: str, shape: Sequence[int], mix: str, model: Shape, layer: int | None = None) -> str | None:
    """Block type of one weight.

    Args:
        name: transformers name of the module or its weight.
        shape: (..., columns); columns are the inputs of a linear, the width of an embedding.
        mix: key of `MIXES`.
        model: what the rules look at of the model.
        layer: number of the layer; read from the name if `None`.

    Returns:
        Key of `BLOCKS`, or `None` for a tensor that stays as it is: fewer than two dimensions, norms, routers, and
        columns that no block fits.

    Raises:
        ConfigError: unknown mix.
    """
    base = base_type(mix)
    if len(shape) < 2 or kept(name):
        return None
    kind = role(name)
    columns = shape[-1]
    if kind is Role.HEAD or (kind is Role.EMBEDDING and model.tied):
        return fitting_type(_head_type(base, columns, model), columns)
    layer = layer_of(name) if layer is None else layer
    if layer is not None:
        base = _layer_type(kind, base, mix, model, layer)
    return fitting_type(base, columns)


def _head_type(base: str, columns: int, model: Shape) -> str:
    if base == "Q8_0" or model.falcon or columns % BLOCKS[base].block:
        return "Q8_0"
    return "Q6_K"


def _layer_type(kind: Role, base: str, mix: str, model: Shape, layer: int) -> str:
    medium = mix in ("Q4_K_M", "Q5_K_M")
    raised = more_bits(layer, model.layers)
    if kind in _VALUES:
        if model.experts == 8:
            return "Q8_0"
        if medium and raised:
            return "Q6_K"
        if mix == "Q4_K_S" and layer < 4:
            return "Q5_K"
        return "Q5_K" if model.large_gqa and base == "Q4_K" else base
    if kind is Role.K and model.experts == 8:
        return "Q8_0"
    if kind is Role.DOWN:
        return _down_type(base, mix, model, layer)
    if kind is Role.ATTENTION_OUT and model.experts == 8 and not model.falcon and base == "Q4_K":
        return "Q5_K"
    return base


def _down_type(base: str, mix: str, model: Shape, layer: int) -> str:
    raised = more_bits(layer, model.layers)
    if mix == "Q4_K_M" and model.falcon:
        if layer < model.layers // 16:
            return "Q6_K"
        return "Q5_K" if raised else base
    if mix in ("Q4_K_M", "Q5_K_M") and raised:
        return "Q6_K"
    if mix == "Q4_K_S" and not model.falcon and layer < model.layers // 8:
        return "Q5_K"
    return base
