"""Packing a model that is in memory already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .codecs import encode_searched
from .config import GgufQuantConfig
from .linear import GgufEmbedding, GgufLinear
from .selection import replacement, types_of


@torch.no_grad()
def quantize_(
    model: Any, mix: str = "Q4_K_M", include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """Packs the weights of `model` in place, one by one; each dense weight is freed as its blocks take its place.

    Args:
        model: a transformers model on any device.
        mix: type of each tensor by llama.cpp's rules, as of `GgufQuantConfig`.
        include: regular expressions of the modules to pack; all by default.
        exclude: regular expressions of modules that stay as they are.
        overrides: regular expression of module names -> block type.

    Returns:
        The same model; `save_pretrained` and `from_pretrained` know it from then on.

    Raises:
        ConfigError: a bad rule, before anything is changed; weights that are not finite, after the modules packed so
            far have been given their decoded weights back.
    """
    config = GgufQuantConfig(mix, include, exclude, overrides)
    types = types_of(model, config.choice())
    shared: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # ids stay unique while the old modules' weights are alive: only tied ones are held
    done: list[tuple[str, Any]] = []
    try:
        for name, type in types.items():
            module = model.get_submodule(name)
            new = _packed(module, type, shared, kept)
            done.append((name, module))
            model.set_submodule(name, new)
    except BaseException:  # an interrupt too: the model is left as it was
        for name, old in done:
            packed = model.get_submodule(name)
            old.weight = nn.Parameter(packed.dequantize(old.weight.dtype))
            model.set_submodule(name, old)
        model.tie_weights()
        raise
    config.types = types
    model.config.quantization_config = config
    _announce(model, config)
    return model


def _packed(module: Any, type: str, shared: dict[int, nn.Parameter], kept: list[Any]) -> GgufLinear | GgufEmbedding:
    weight = module.weight
    with torch.device("meta"):
        new = replacement(module, type, weight.dtype, packed=True)
    if id(weight) not in shared:
        shared[id(weight)] = nn.Parameter(encode_searched(weight, type), requires_grad=False)
        kept.append(weight)
        weight.data = weight.new_empty(0)
    new.weight = shared[id(weight)]
    if isinstance(new, GgufLinear):
        new.bias = module.bias
    new.train(module.training)
    return new


def _announce(model: Any, config: GgufQuantConfig) -> None:
    from .quantizer import GgufQuantizer

    model.hf_quantizer = GgufQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
