"""`save_gguf`: a model as a `.gguf` file, its packed weights block for block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .dtype_mark import NAME
from .experts import GgufExperts, experts_part
from .gguf_file import FILE_TYPES
from .gguf_metadata import family_of
from .gguf_vocabulary import vocabulary_of
from .gguf_write import Weight, write_gguf
from .linear import GgufEmbedding, GgufLinear
from .roles import kept
from .stored import stored_scheme


def save_gguf(
    model: Any, path: str | os.PathLike[str], tokenizer: Any = None, *,
    metadata: Mapping[str, str | int | float | bool] | None = None,
) -> Path:  # fmt: skip
    """Write a model as a `.gguf` file, which `load_gguf`, transformers and llama.cpp's tools read.

    Weights that `quantize_`, `GgufQuantConfig` or `load_gguf` packed are written block for block. Dense matrices keep
    their 16 bits (float16, bfloat16) or are float32; vectors and routers are float32.

    Args:
        model: a transformers model of one of the types in `gguf_metadata.ARCHITECTURES`.
        path: the file; one that is there is replaced once the new one is complete.
        tokenizer: a fast tokenizer whose vocabulary goes into the file; without one the file has none.
        metadata: more keys, or other values, e.g. `{"general.license": "mit"}`. llama.cpp splits texts by
            `tokenizer.ggml.pre`, which is `"default"` unless it is given here.

    Returns:
        The path.

    Raises:
        UnsupportedModelError: a model type, a setting, a weight, a rotary scaling or a tokenizer that no file holds.
        ConfigError: weights of another project's format, or that are not in memory; a folder that is not there.
        CtxoptError: the package `gguf` is missing.
        OSError: the file cannot be written; an older one of that name is untouched.
    """
    if not Path(path).parent.is_dir():
        raise ConfigError("path", str(path), "a file in a folder that exists")
    config = model.config.get_text_config()
    family_of(config)
    values: dict[str, str | int | float | bool] = {"general.quantization_version": 2}
    mix = stored_scheme(getattr(model.config, "quantization_config", None))
    number = next((number for number, name in FILE_TYPES.items() if name == mix), None)
    if number is not None:
        values["general.file_type"] = number
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, int(config.vocab_size))
    if vocabulary is not None:
        values |= vocabulary.tokens
    return write_gguf(
        path, config, _weights(model), metadata={**values, **(metadata or {})},
        prepare=None if vocabulary is None else vocabulary.write,
    )  # fmt: skip


def _weights(model: Any) -> Iterator[Weight]:
    """Every parameter once, a tied head left out; experts' gate and up rows apart, as llama.cpp has them."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == NAME:
            continue
        module = model.get_submodule(owner)
        if parameter.is_meta:
            raise ConfigError(name, "on the meta device", "a weight in memory: the model is loaded in part")
        experts = experts_part(model, name)
        if experts is not None:
            kind = module.block_types.get(leaf) if isinstance(module, GgufExperts) else None
            yield from _expert_weights(name, kind, parameter.detach())
        elif isinstance(module, GgufLinear | GgufEmbedding) and leaf == "weight":
            yield Weight(name, module.block_type, module.packed().detach())
        elif not parameter.is_floating_point():
            raise ConfigError(name, str(parameter.dtype), "blocks of ours, or floating weights")
        else:
            yield Weight(name, None, parameter.detach().float() if kept(name) else parameter.detach())


def _expert_weights(name: str, kind: str | None, data: torch.Tensor) -> Iterator[Weight]:
    owner, _, part = name.rpartition(".")
    if part == "down_proj":
        yield Weight(f"{owner}.down_proj.weight", kind, data)
        return
    for half, rows in zip(("gate_proj", "up_proj"), data.chunk(2, dim=1), strict=True):
        yield Weight(f"{owner}.{half}.weight", kind, rows.contiguous())
