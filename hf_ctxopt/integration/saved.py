"""Saved contexts: a prefix store's texts in a file, for a warm start of another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.prefix import PrefixCache
from ..caches.store import PrefixStore
from ..caches.store_file import load, save
from ..caches.stores import drop_store, store_named, stores
from ..errors import ConfigError
from .build import make_cache, unwrap
from .fingerprint import fingerprint


def save_store(store: str | PrefixStore, path: str | Path) -> int:
    """Write everything a prefix store holds; returns the pages written.

    The file holds the texts, their keys and values, and the salts: whoever reads it reads the prompts. It is written
    with mode 0600 and replaces an earlier one at once or, whatever interrupts, not at all.

    Args:
        store: the store or its name.
        path: the file.

    Raises:
        ConfigError: there is no store of that name, or no such folder.
    """
    if isinstance(store, str):
        if store not in stores():
            known = ", ".join(stores()) or "there is none so far"
            raise ConfigError("store", store, f"a store of this process ({known})")
        store = store_named(store)
    if not Path(path).parent.is_dir():
        raise ConfigError("path", str(path), "a file in a folder that exists")
    return save(store, path)


def load_store(path: str | Path, model: nn.Module, store: str, **options: Any) -> int:
    """Take the texts of a file into a store; returns the pages taken. What the store has already stays.

    Args:
        path: the file.
        model: the model whose states they are; its fingerprint must be that of the model that made them.
        store: name of the store.
        **options: of `ctx_prefix`: `page_size`, `kv_bits` … as they were, and the `budget`.

    Raises:
        CorruptFileError: the file is damaged, truncated, of another model or layout, or larger than the budget. It is
            refused before memory is taken, and leaves no store behind that was not there.
        ConfigError: see `make_cache`.
    """
    inner: Any = unwrap(model)
    known, taken = store in stores(), None
    cache = make_cache(model, "ctx_prefix", store=store, **options)
    if not isinstance(cache, PrefixCache):
        raise ConfigError("store", store, "the name of a prefix store")
    try:
        taken = load(cache.store, path, fingerprint(inner), cache.groups, lambda layer: _like(inner, layer))
        return taken
    finally:
        cache.release()
        if taken is None and not known:
            drop_store(store)


def _like(model: Any, layer: int) -> Tensor:
    """An empty tensor of the model's dtype where the layer's weights lie."""
    marks = tuple(f".{name}.{layer}." for name in ("layers", "h", "blocks", "block"))
    for name, tensor in model.named_parameters():
        if any(mark in f".{name}" for mark in marks) and not tensor.is_meta:
            return torch.empty(0, dtype=model.dtype, device=tensor.device)
    return torch.empty(0, dtype=model.dtype, device=model.device)
