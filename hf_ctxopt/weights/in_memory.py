"""Packing a model that is in memory already."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .codecs import LARGEST, decode, encode_searched
from .config import GgufQuantConfig
from .dtype_mark import mark_dtype
from .experts import GgufExperts, experts_part
from .linear import GgufEmbedding, GgufLinear
from .merging import guard_merging
from .selection import replacement, types_of
from .stored import is_packed, method_of
from .told import tell

logger = logging.getLogger(__name__)


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
        ConfigError: before anything is changed: a bad rule, rules by which nothing (more) is packed, a model that
            something else has packed or that has PEFT's adapters, weights on the meta device, that are not finite or
            do not fit fp16.
    """
    config = GgufQuantConfig(mix, include, exclude, overrides)
    before = _stored(model)
    types = types_of(model, config.choice())
    _check(model, types)
    dtype = model.dtype
    freed: dict[int, _Freed] = {}  # by the id of a weight: those that modules share come once
    done: dict[str, Any] = {}
    try:
        for name, type in types.items():
            experts = experts_part(model, name)
            if experts is not None:
                owner, module, part = experts
                if not isinstance(module, GgufExperts):
                    done[owner], module = module, GgufExperts(module)
                    model.set_submodule(owner, module)
                module.pack(part, type, _free(getattr(done[owner], part), type, freed).blocks)
                continue
            module = model.get_submodule(name)
            new = _packed(module, type, freed)
            done[name] = module
            model.set_submodule(name, new)
    except BaseException:  # an interrupt too: the model is dense again
        for weight in freed.values():
            weight.restore()
        for name, old in done.items():
            model.set_submodule(name, old)
        if freed:
            logger.warning(
                "packing stopped: %d weights were packed already and are rounded to their blocks' values", len(freed)
            )
        raise
    config.types = types
    if before is not None:
        config = _together(before, config)
    model.config.quantization_config = config
    mark_dtype(model, dtype)
    tell(model)
    _announce(model, config)
    return model


@dataclass
class _Freed:
    """A dense weight that has given up its values, and its blocks."""

    weight: nn.Parameter
    type: str
    blocks: nn.Parameter
    transposed: bool

    def restore(self) -> None:
        """Decode the values into the same parameter, so that ties and `requires_grad` are as they were."""
        values = decode(self.blocks, self.type, self.weight.dtype)
        self.weight.data = values.T.contiguous() if self.transposed else values


def _free(weight: nn.Parameter, type: str, freed: dict[int, _Freed], transposed: bool = False) -> _Freed:
    """Pack `weight` and let its values go, unless that is done already."""
    if id(weight) not in freed:
        blocks = encode_searched(weight.T if transposed else weight, type)
        freed[id(weight)] = _Freed(weight, type, nn.Parameter(blocks, requires_grad=False), transposed)
        weight.data = weight.new_empty(0)
    return freed[id(weight)]


def _check(model: Any, types: Mapping[str, str]) -> None:
    """Look at all weights before the first is packed: what has been packed comes back rounded."""
    for name in types:
        experts = experts_part(model, name)
        weight: Tensor = model.get_submodule(name).weight if experts is None else getattr(experts[1], experts[2])
        if weight.device.type == "meta":
            raise ConfigError("model", f"{name} on the meta device", "a model whose weights are in memory")
        if weight.numel():
            low, high = (float(end) for end in weight.aminmax())  # both NaN if one weight is
            if not (low >= -LARGEST and high <= LARGEST):
                raise ConfigError(name, max(-low, high), f"finite weights of at most {LARGEST:g}")


def _stored(model: Any) -> GgufQuantConfig | None:
    """How `model` is packed already. Raises `ConfigError` if something else has packed it.

    One with PEFT's adapters is refused too: they would be packed, and their training would end.
    """
    if any(kind.__module__.startswith("peft.") for part in model.modules() for kind in type(part).__mro__):
        raise ConfigError("model", "with PEFT's adapters", "one without: pack it first, then call get_peft_model")
    stored = getattr(model.config, "quantization_config", None)
    if isinstance(stored, GgufQuantConfig):
        return stored
    method, _ = method_of(stored)
    # transformers 5.24 leaves its mark of a .gguf file on models that it has unpacked, too.
    if is_packed(model) or method not in (None, "gguf"):
        raise ConfigError("model", f"packed by {method}", "a dense model, or one that hf_ctxopt has packed")
    return None


def _together(old: GgufQuantConfig, new: GgufQuantConfig) -> GgufQuantConfig:
    """Both stages: all types, and the name of the mix that packed more modules. Rules of one stage are left out."""
    first, second = old.types or {}, new.types or {}
    return GgufQuantConfig(new.mix if len(second) > len(first) else old.mix, types={**first, **second})


def _packed(module: Any, type: str, freed: dict[int, _Freed]) -> GgufLinear | GgufEmbedding:
    with torch.device("meta"):
        new = replacement(module, type, module.weight.dtype, packed=True)
    new.weight = _free(module.weight, type, freed, isinstance(module, Conv1D)).blocks
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
