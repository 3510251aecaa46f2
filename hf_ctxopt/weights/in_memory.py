"""Packing a model that is in memory already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .codecs import encode_searched
from .config import GgufQuantConfig
from .experts import GgufExperts, experts_part
from .linear import GgufEmbedding, GgufLinear
from .merging import guard_merging
from .selection import replacement, types_of


@torch.no_grad()
def quantize_(
    model: Any, mix: str = "Q4_K_M", include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """Packs the weights of `model` in place, one by one; each dense weight is freed as its blocks take its place.

    A model may be packed in stages, with rules for different modules; what is packed stays as it is.

    Args:
        model: a transformers model on any device.
        mix: type of each tensor by llama.cpp's rules, as of `GgufQuantConfig`.
        include: regular expressions of the modules to pack; all by default.
        exclude: regular expressions of modules that stay as they are.
        overrides: regular expression of module names -> block type.

    Returns:
        The same model; `save_pretrained` and `from_pretrained` know it from then on.

    Raises:
        ConfigError: a bad rule, rules by which nothing (more) is packed, a model that something else has packed, all
            before anything is changed; weights that are not finite, after the modules packed so
            far have been given their decoded weights back.
    """
    config = GgufQuantConfig(mix, include, exclude, overrides)
    before = _stored(model)
    types = types_of(model, config.choice())
    shared: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # ids stay unique while the old modules' weights are alive: only tied ones are held
    done: dict[str, Any] = {}
    try:
        for name, type in types.items():
            experts = experts_part(model, name)
            if experts is not None:
                owner, module, part = experts
                if not isinstance(module, GgufExperts):
                    done[owner], module = module, GgufExperts(module)
                    model.set_submodule(owner, module)
                _pack_part(done[owner], module, part, type)
                continue
            module = model.get_submodule(name)
            new = _packed(module, type, shared, kept)
            done[name] = module
            model.set_submodule(name, new)
    except BaseException:  # an interrupt too: the model is left as it was
        for name, old in done.items():
            packed = model.get_submodule(name)
            if isinstance(packed, GgufExperts):
                for part in packed.block_types:
                    dtype = getattr(old, part).dtype
                    setattr(old, part, nn.Parameter(packed.dequantize(part, dtype)))
            else:
                values = packed.dequantize(old.weight.dtype)
                old.weight = nn.Parameter(values.T.contiguous() if isinstance(old, Conv1D) else values)
            model.set_submodule(name, old)
        model.tie_weights()
        raise
    config.types = types
    if before is not None:
        config = _together(before, config)
    model.config.quantization_config = config
    _announce(model, config)
    return model


def _stored(model: Any) -> GgufQuantConfig | None:
    """How `model` is packed already. Raises `ConfigError` if something else has packed it."""
    stored = getattr(model.config, "quantization_config", None)
    if isinstance(stored, GgufQuantConfig):
        return stored
    values = stored if isinstance(stored, dict) else vars(stored) if stored is not None else {}
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    # transformers 5.24 leaves its mark of a .gguf file on models that it has unpacked, too.
    packed = any(part.dim() > 1 and not part.is_floating_point() for part in model.parameters())
    if packed or method not in (None, "gguf"):
        raise ConfigError("model", f"packed by {method}", "a dense model, or one that hf_ctxopt has packed")
    return None


def _together(old: GgufQuantConfig, new: GgufQuantConfig) -> GgufQuantConfig:
    """Both stages: all types, and the name of the mix that packed more modules. Rules of one stage are left out."""
    first, second = old.types or {}, new.types or {}
    return GgufQuantConfig(new.mix if len(second) > len(first) else old.mix, types={**first, **second})


def _pack_part(old: Any, new: GgufExperts, part: str, type: str) -> None:
    """Pack one parameter of experts; the dense one, which both modules hold, is freed."""
    weight = getattr(old, part)
    new.pack(part, type, encode_searched(weight, type))
    weight.data = weight.new_empty(0)


def _packed(module: Any, type: str, shared: dict[int, nn.Parameter], kept: list[Any]) -> GgufLinear | GgufEmbedding:
    weight = module.weight
    with torch.device("meta"):
        new = replacement(module, type, weight.dtype, packed=True)
    if id(weight) not in shared:
        rows = weight.T if isinstance(module, Conv1D) else weight
        shared[id(weight)] = nn.Parameter(encode_searched(rows, type), requires_grad=False)
        kept.append(weight)
        weight.data = weight.new_empty(0)
    new.weight = shared[id(weight)]
    if isinstance(new, GgufLinear):
        new.bias = module.bias
    new.train(module.training)
    return new


def _announce(model: Any, config: GgufQuantConfig) -> None:
    from .quantizer import GgufQuantizer

    guard_merging()
    model.hf_quantizer = GgufQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
