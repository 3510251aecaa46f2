"""Encode and decode weights as GGUF blocks, on the tensor's own device.

A tensor is worked through in slabs of whole blocks, so the scratch memory is bounded whatever the tensor's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from . import flat, superblock
from .blocks import block_type, packed_columns

# Weights per slab. About ten float32 intermediates are alive at once: 10 MB on a CPU, where a slab that stays in
# the cache is also the fastest; 80 MB on a GPU, where small slabs would be bound by kernel launches.
SLAB_CPU, SLAB_GPU = 1 << 18, 1 << 21
LARGEST = 65504.0  # of fp16, which holds the blocks' scales and minima

_ROUNDED = {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}  # types whose scales are not searched for without an importance
_DECODERS = {**flat.DECODERS, **superblock.DECODERS}
_ENCODERS = {**flat.ENCODERS, **superblock.ENCODERS}


def _slab(tensor: Tensor) -> int:
    return SLAB_GPU if tensor.is_cuda else SLAB_CPU


@torch.no_grad()
def encode(weight: Tensor, type: str, importance: Tensor | None = None) -> Tensor:
    """Packs a weight.

    Args:
        weight: (..., columns), floating; columns a multiple of the type's block.
        type: key of `BLOCKS`.
        importance: (columns,) or broadcastable to `weight`, non-negative: how much an error in a column counts
            (llama.cpp's importance matrix: the mean square of the activations).

    Returns:
        uint8 (..., columns // block * nbytes), on the weight's device.

    Raises:
        ConfigError: unknown type; columns that are no whole number of blocks; weights that are not finite or do not
            fit fp16; an importance of another shape.
    """
    row = block_type(type)
    columns = weight.shape[-1] if weight.dim() else 0
    width = packed_columns(columns, type) if weight.dim() else 0
    if not weight.dim() or not weight.is_floating_point():
        raise ConfigError("weight", f"{weight.dtype} {tuple(weight.shape)}", "a floating tensor (..., columns)")
    packed = torch.empty(*weight.shape[:-1], width, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return packed
    rows = weight.detach().reshape(-1, columns)
    counts = None if importance is None else _importance_rows(importance, weight)
    out = packed.view(-1, width)
    step = max(1, _slab(weight) // columns)
    largest = torch.zeros((), device=weight.device)
    for first in range(0, len(rows), step):
        slab = rows[first : first + step].float().contiguous().view(-1, row.block)
        largest = torch.maximum(largest, slab.abs().amax())
        share = None
        if counts is not None:
            share = (counts if len(counts) == 1 else counts[first : first + step]).float()
            share = share.expand(min(step, len(rows) - first), columns).reshape(-1, row.block)
        out[first : first + step] = _ENCODERS[type](slab, share).view(-1, width)
    # One look at the end: a check per slab would make a GPU wait each time. NaN compares false.
    if not bool(largest <= LARGEST):
        raise ConfigError("weight", float(largest), f"finite values of at most {LARGEST:g}")
    return packed


def encode_searched(weight: Tensor, type: str) -> Tensor:
    """As `encode`, with the scales of the flat types searched for, as with an importance that is the same everywhere.

    ggml's encoders only round to the range of a block there. That is what `encode` must equal, but models whose
    columns are no multiple of 256 rest on these types. The search takes 5 to 11 % off the error of normal weights, and
    far more where weights were on a coarser grid before.
    """
    return encode(weight, type, weight.new_ones(weight.shape[-1]) if type in _ROUNDED else None)


def _importance_rows(importance: Tensor, weight: Tensor) -> Tensor:
    """Importance as (1 or rows, columns) on the weight's device."""
    try:
        torch.broadcast_shapes(importance.shape, weight.shape)
        fits = importance.dim() <= weight.dim() and importance.shape[-1:] == weight.shape[-1:]
    except RuntimeError:
        fits = False
    if not fits:
        raise ConfigError("importance", tuple(importance.shape), f"({weight.shape[-1]},) or {tuple(weight.shape)}")
    importance = importance.detach().to(weight.device)
    if importance.numel() == weight.shape[-1]:
        return importance.reshape(1, -1)
    return importance.expand(weight.shape).reshape(-1, weight.shape[-1])


@torch.no_grad()
def decode(packed: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpacks a weight; in float32 the values are those of the `gguf` package bit for bit.

    Args:
        packed: uint8 (..., bytes), bytes a multiple of the type's `nbytes`.
        type: key of `BLOCKS`.
        dtype: of the result; other types than float32 are rounded from it.

    Returns:
        (..., bytes // nbytes * block) on the same device.

    Raises:
        ConfigError: unknown type, a tensor that is not uint8, bytes that are no whole number of blocks.
    """
    row = block_type(type)
    if packed.dtype != torch.uint8 or not packed.dim():
        raise ConfigError("packed", f"{packed.dtype} {tuple(packed.shape)}", "a uint8 tensor (..., bytes)")
    if packed.shape[-1] % row.nbytes:
        raise ConfigError("bytes per row", packed.shape[-1], f"a multiple of {row.nbytes}, a block of {row.name}")
    columns = packed.shape[-1] // row.nbytes * row.block
    weight = torch.empty(*packed.shape[:-1], columns, dtype=dtype, device=packed.device)
    if not packed.numel():
        return weight
    blocks, out = packed.reshape(-1, row.nbytes), weight.view(-1, row.block)
    step = max(1, _slab(packed) // row.block)
    for first in range(0, len(blocks), step):
        out[first : first + step] = _DECODERS[type](blocks[first : first + step])
    return weight
