"""What a layer brings must fit the pages it has: torch would broadcast, cast or move it without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pages.storage import LayerStorage


def fitting(keys: Tensor, values: Tensor, storage: LayerStorage | None, layer: int) -> tuple[Tensor, Tensor]:
    """States in the dtype that the layer's pages have, or will have.

    Inside `torch.autocast`, rotated keys are often wider than values: attention casts both, so pages get them in
    autocast's dtype at once. Pages that were begun outside keep theirs. Outside nothing casts, and nothing is cast.

    Args:
        keys: `(batch, kv_heads, seq, key_dim)`.
        values: `(batch, kv_heads, seq, value_dim)`.
        storage: the layer's pages; `None` before its first step.
        layer: its index.

    Raises:
        ConfigError: other heads, channels, dtype or device than the pages have, or keys and values of unequal length.
    """
    shape, other = keys.shape, values.shape
    if shape[0] != other[0] or shape[2] != other[2]:
        _refuse("value_states", tuple(other), layer, f"as many rows and tokens as keys, {tuple(shape)}")
    kind = keys.device.type
    if torch.is_autocast_enabled(kind) and keys.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
        keys = keys.to(dtype if storage is None else storage.keys.dtype)
        values = values.to(dtype if storage is None else storage.values.dtype)
    if storage is not None:
        _check("key", keys, storage.keys, layer)
        _check("value", values, storage.values, layer)
    return keys, values


def _check(part: str, states: Tensor, pages: Tensor, layer: int) -> None:
    """Compare `(batch, kv_heads, seq, head_dim)` with pages `(kv_heads, pages, page_size, head_dim)`."""
    shape, held = states.shape, pages.shape
    if shape[1] != held[0] or shape[3] != held[3]:
        given = f"{shape[1]} heads of {shape[3]} channels"
        _refuse(f"{part}_states", given, layer, f"{held[0]} heads of {held[3]}")
    if states.dtype != pages.dtype:
        _refuse(
            f"{part}_states.dtype", states.dtype, layer, f"{pages.dtype}; run all steps of a text inside "
            "torch.autocast, or none of them, and with the model in one dtype"
        )  # fmt: skip
    if states.device != pages.device:
        _refuse(f"{part}_states.device", str(states.device), layer, f"{pages.device}; cache.reset() forgets the pages")


def _refuse(field: str, value: Any, layer: int, allowed: str) -> None:
    raise ConfigError(field, value, f"what layer {layer}'s pages hold, {allowed}")
