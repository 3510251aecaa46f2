"""Bytes of a `.gguf` file's weights, from a config: what the mixes' rules are held against published files with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_ctxopt.weights.blocks import packed_bytes
from hf_ctxopt.weights.mixes import Shape, tensor_type
from hf_ctxopt.weights.shapes import meta_model, shape_of, weights_of

F16_BYTES, F32_BYTES = 2, 4


def size_of(model: Any, mix: str) -> int:
    """Bytes of the weights packed as `mix`, as a `.gguf` file holds them: kept tensors in float32, columns that no
    block fits in float16, a tied head once.

    Args:
        model: a transformers config, or a model (one on the meta device will do).
        mix: key of `MIXES`.

    Raises:
        ConfigError: unknown mix.
    """
    module = model if isinstance(model, nn.Module) else meta_model(model)
    shape = shape_of(module.config)
    total = 0
    for name, size in weights_of(module):
        kind = tensor_type(name, size, mix, shape)
        if kind is not None:
            total += packed_bytes(size, kind)
        else:
            total += math.prod(size) * (F16_BYTES if _matrix_without_block(name, size, mix, shape) else F32_BYTES)
    return total


def _matrix_without_block(name: str, size: Sequence[int], mix: str, shape: Shape) -> bool:
    """Whether only the columns keep a matrix from being packed."""
    return len(size) >= 2 and tensor_type(name, (*size[:-1], 256), mix, shape) is not None
