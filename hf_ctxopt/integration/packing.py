"""Packing weights under one name, `weights=`, whichever project packs them: while loading, and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..planner.schemes import PLAIN, SCHEMES
from ..weights.config import METHOD, GgufQuantConfig
from ..weights.in_memory import quantize_
from ..weights.mixes import MIXES
from ..weights.others import OTHERS, check_other, other
from ..weights.stored import DENSE, is_packed, method_of
from .chunking import compute_device


def check_scheme(weights: str, device: str, stored: Any) -> bool:
    """Whether a model can be loaded as `weights`, and whether its checkpoint holds it so already.

    Args:
        weights: one of `SCHEMES`.
        device: type of the device that it is to run on.
        stored: the `quantization_config` of the checkpoint's config, `None` for a dense one.

    Returns:
        True where nothing is packed while loading: the checkpoint's weights are those asked for, 16-bit ones too if
        they are unpacked to these.

    Raises:
        ConfigError: an unknown scheme, one that does not run on the device, or a checkpoint that is packed otherwise.
        CtxoptError: a package is missing.
    """
    if weights not in SCHEMES:
        raise ConfigError("weights", weights, f"one of {', '.join(SCHEMES)}")
    if weights in OTHERS:
        check_other(weights, device)
    method, mix = method_of(stored)
    if weights == PLAIN and method in DENSE:
        return True
    if method in DENSE:
        row = OTHERS.get(weights)
        if row is not None and row.make is None and row.pack is None:
            allowed = f"a scheme to pack with: this checkpoint is not packed, and {weights} ones are made elsewhere"
            raise ConfigError("weights", weights, allowed)
        return False
    if (METHOD, weights) == (method, mix) or (weights in OTHERS and OTHERS[weights].method == method):
        return True
    raise ConfigError("weights", weights, f"what the checkpoint is packed as already: {mix or method}")


def loading_config(weights: str, kept: Sequence[str], dtype: Any) -> Any:
    """The `quantization_config` for `from_pretrained`; `None` where a model is packed once it is loaded.

    Args:
        weights: a scheme that packs.
        kept: patterns of modules that stay dense, for GGUF mixes; the others keep embedding and head anyway.
        dtype: of the activations.
    """
    if weights in MIXES:
        return GgufQuantConfig(weights, exclude=kept)
    make = other(weights).make
    return None if make is None else make(dtype)


def pack_loaded(model: Any, weights: str, kept: Sequence[str], device: Any) -> None:
    """Pack a dense model in memory as `weights`, one of a GGUF mix or a scheme with a packer of its own.

    Args:
        model: a transformers model.
        weights: the scheme.
        kept: patterns of modules that stay dense, for GGUF mixes.
        device: where the other projects' packed layers go.
    """
    if weights in MIXES:
        quantize_(model, weights, exclude=kept)
        return
    pack = other(weights).pack
    if pack is not None:
        pack(model, model.dtype, device)


def check_in_memory(model: Any, weights: str) -> bool:
    """Whether `weights` asks for packing a model that is in memory.

    Raises:
        ConfigError: an unknown scheme, one that packs only while loading, or a model that is packed otherwise.
        CtxoptError: a package is missing.
    """
    if weights not in SCHEMES:
        raise ConfigError("weights", weights, f"one of {', '.join(SCHEMES)}")
    method, mix = method_of(getattr(model.config, "quantization_config", None))
    # transformers 5.24 leaves its mark of a .gguf file on models that it has unpacked, too.
    if is_packed(model) or method not in (None, "gguf"):
        if (METHOD, weights) == (method, mix):
            return False
        raise ConfigError("weights", weights, f"None: this model is packed already ({mix or method or 'hqq'})")
    if weights == PLAIN:
        return False
    if weights in OTHERS:
        check_other(weights, compute_device(model).type)
        if OTHERS[weights].pack is None:
            allowed = f"{', '.join([*MIXES, *(name for name, row in OTHERS.items() if row.pack is not None)])} for a "
            allowed += f"model in memory; {weights} is packed while loading: hf_ctxopt.load(path, weights={weights!r})"
            raise ConfigError("weights", weights, allowed)
    return True


def pack_in_memory(model: Any, weights: str) -> None:
    """Pack a model where it is, after `check_in_memory`."""
    pack_loaded(model, weights, (), compute_device(model))
