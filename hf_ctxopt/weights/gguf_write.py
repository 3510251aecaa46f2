"""Writes a model as a `.gguf` file that the `gguf` package, transformers and llama.cpp's tools read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError
from .blocks import block_type
from .gguf_file import need_gguf
from .gguf_metadata import ARCHITECTURES, PLUS_ONE, ROTATED, family_of, metadata_of, rotated_channels
from .gguf_rope import FREQUENCIES, frequency_divisors, rotary_of
from .row_orders import halves_to_rotary


@dataclass(frozen=True)
class Weight:
    """One weight to be written.

    Args:
        parameter: transformers' name, e.g. `model.layers.0.self_attn.q_proj.weight`.
        type: block type, or `None` for plain values.
        data: uint8 (..., bytes of a row) if packed, else floating; float16, bfloat16 and float32 are kept, others
            become float32, and so do vectors.
    """

    parameter: str
    type: str | None
    data: Tensor


def write_gguf(
    path: str | os.PathLike[str],
    config: Any,
    weights: Iterable[Weight],
    *,
    metadata: Mapping[str, str | int | float | bool] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """Writes the weights of a model; the file appears under its name when it is complete.

    Args:
        path: the file, replaced if it exists.
        config: the model's transformers config (of the text model).
        weights: all of them, a tied head left out. Held by reference until they are written, one after the other.
        metadata: more keys, e.g. `general.license`.
        prepare: called with the `gguf.GGUFWriter` before the header is written, e.g. to add a vocabulary.

    Returns:
        The path.

    Raises:
        UnsupportedModelError: an architecture or a weight with no place in a file.
        ConfigError: a packed weight whose rows are no whole number of blocks.
        CtxoptError: the package `gguf` is missing.
        OSError: the file cannot be written; an older one of that name is untouched.
    """
    gguf = need_gguf()
    target = Path(path)
    family = family_of(config)
    architecture = ARCHITECTURES[family][0]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        # Not the architecture's name: llama.cpp wants certain tokens of what is called phi3.
        writer.add_name(str(getattr(config, "name_or_path", "") or "model"))
        for key, value in {**metadata_of(config), **(metadata or {})}.items():
            _add(writer, key, value)
        if prepare is not None:
            prepare(writer)
        kept = []
        for weight in weights:
            name = names.get_name(weight.parameter, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UnsupportedModelError(f"{weight.parameter} has no place in a .gguf of {architecture}")
            kept.append(weight)
            _announce(writer, gguf, name, weight)
        divisors = frequency_divisors(rotary_of(config), rotated_channels(config))
        if divisors is not None:
            kept.append(Weight(FREQUENCIES, None, divisors))
            _announce(writer, gguf, FREQUENCIES, kept[-1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in kept:
            writer.write_tensor_data(_array(weight, config, family))
        writer.close()
        os.replace(partial, target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return target


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


def _plain(data: Tensor) -> torch.dtype:
    return data.dtype if data.dtype in (torch.float16, torch.bfloat16) and data.dim() > 1 else torch.float32


def _announce(writer: Any, gguf: Any, name: str, weight: Weight) -> None:
    data = weight.data
    if weight.type is None and _plain(data) is torch.bfloat16:  # numpy has none: bytes, two a weight
        shape, kind = (*data.shape[:-1], 2 * data.shape[-1]), gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), 2 * data.numel(), raw_dtype=kind)
        return
    if weight.type is None:
        dtype = np.dtype(np.float16 if _plain(data) is torch.float16 else np.float32)
        writer.add_tensor_info(name, tuple(data.shape), dtype, data.numel() * dtype.itemsize)
        return
    row = block_type(weight.type)
    if data.dtype != torch.uint8 or data.shape[-1] % row.nbytes:
        allowed = f"uint8 with rows of a multiple of {row.nbytes} bytes ({row.name})"
        raise ConfigError(weight.parameter, f"{data.dtype} {tuple(data.shape)}", allowed)
    kind = gguf.GGMLQuantizationType[row.name]
    writer.add_tensor_info(name, tuple(data.shape), np.dtype(np.uint8), data.numel(), raw_dtype=kind)


def _array(weight: Weight, config: Any, family: str) -> np.ndarray[Any, Any]:
    """The weight's data as the file holds it: rows of q and k in pairs, Gemma's norms plus one."""
    data = weight.data.detach().cpu()
    rotary = re.search(r"\.self_attn\.([qk])_proj\.", weight.parameter)
    if family in ROTATED and rotary:
        heads = config.num_attention_heads if rotary[1] == "q" else config.num_key_value_heads
        data = data[halves_to_rotary(data.shape[0], heads)]
    if weight.type is None:
        data = data.to(_plain(data))
        if family in PLUS_ONE and weight.parameter.endswith("norm.weight"):
            data = data + 1
        data = data.contiguous().view(torch.uint8) if data.dtype is torch.bfloat16 else data
    array: np.ndarray[Any, Any] = data.contiguous().numpy()
    return array
