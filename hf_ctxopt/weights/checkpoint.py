"""A packed model against the checkpoint it comes from, or goes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .codecs import encode_searched
from .experts import GgufExperts, experts_part, packed_type
from .linear import GgufEmbedding, GgufLinear


def types_in(model: Any, types: Mapping[str, str]) -> dict[str, str]:
    """A saved model's block types by the names of `model`, which may be of another class.

    As transformers does with the weights: a base model's come with or without its prefix, and what `model` has no
    place for (a head) is passed over.

    Raises:
        ConfigError: nothing fits, or the type is of a module that holds no matrix.
    """
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    found = {}
    for name, type in types.items():
        for own in (name, prefix + name, name.removeprefix(prefix)):
            owner = own.rpartition(".")[0]
            if own in modules or (owner in modules and experts_part(model, own) is not None):
                found[own] = type
                break
    if not found:
        raise ConfigError("quantization_config.types", sorted(types)[:3], f"names of modules of {_kind(model)}")
    return found


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """See to it that the packed modules have got their weights, packed.

    transformers draws new weights only for dense modules. It asks once for a fused tensor of a checkpoint whether it
    is to be packed, by its first part: where that one stays dense, the others come dense and are packed here.

    Raises:
        ConfigError: the checkpoint lacks some; some went to the disk before they were packed.
    """
    missing = []
    for name, module, leaf, part in list(_parameters(model)):
        type = packed_type(module, leaf) if part.is_floating_point() else None
        if part.is_meta and type is not None:
            allowed = "devices: what goes to the disk is not packed on its way; save the packed model, and load that"
            raise ConfigError("device_map", f"{name} on the disk", allowed)
        if not (part.is_meta or hasattr(part, "_is_hf_initialized")):
            missing.append(name)
        elif type is not None:
            setattr(module, leaf, nn.Parameter(encode_searched(part, type), requires_grad=False))
    if missing:
        named = ", ".join(missing[:3]) + (" …" if missing[3:] else "")
        raise ConfigError(
            "checkpoint", f"without {len(missing)} weights of {_kind(model)}: {named}",
            "one of the class that is loaded; modules that it has no weights for, as a new head, stay dense and are "
            "drawn anew where `exclude` names them",
        )  # fmt: skip


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, its name in there, value) of what packed modules hold, tied ones under each name."""
    for name, module in model.named_modules():
        if isinstance(module, GgufLinear | GgufEmbedding | GgufExperts):
            for leaf, part in module.named_parameters(recurse=False):
                yield f"{name}.{leaf}", module, leaf, part


def _kind(model: nn.Module) -> str:
    return type(model).__name__
