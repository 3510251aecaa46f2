"""The bytes: K and V of all pages of one layer.

Storage is `(kv_heads, pages, page_size, head_dim)`, so pages that neighbour in the pool are neighbouring tokens for
every head: a stretch of them is a plain `(kv_heads, tokens, head_dim)` view, read without a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Stretch


class LayerStorage:
    """K and V of one layer. Made from the first tensors that arrive, never from a config.

    Args:
        keys: first key states, `(batch, kv_heads, seq, key_dim)`: gives heads, size, dtype and device.
        values: first value states, `(batch, kv_heads, seq, value_dim)`.
        page_size: tokens of a page.
        capacity: pages.
    """

    def __init__(self, keys: Tensor, values: Tensor, page_size: int, capacity: int) -> None:
        self.page_size = page_size
        self.keys = self._new(keys, capacity)
        self.values = self._new(values, capacity)

    def _new(self, like: Tensor, capacity: int) -> Tensor:
        # Zeros, not empty: padding columns gather slot 0, and 0 x NaN would poison a masked-out product.
        return _zeros(like, like.shape[1], capacity, self.page_size, like.shape[-1])

    @property
    def capacity(self) -> int:
        """Pages allocated."""
        return self.keys.shape[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's K and V."""
        return sum(t.shape[0] * t.shape[2] * t.shape[3] * t.element_size() for t in (self.keys, self.values))

    def resize(self, capacity: int) -> None:
        """Allocate `capacity` pages and keep the contents of those that remain.

        Both are allocated before either is replaced: an allocation that fails leaves the storage as it was.
        """
        if capacity == self.capacity:
            return
        keep = min(capacity, self.capacity)
        grown: dict[str, Tensor] = {}
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            grown[name] = _zeros(old, old.shape[0], capacity, *old.shape[2:])
            grown[name][:, :keep] = old[:, :keep]
        self.keys, self.values = grown["keys"], grown["values"]

    def compacted(self, pages: list[int], capacity: int) -> tuple[Tensor, Tensor]:
        """K and V of `capacity` pages that begin with copies of the listed ones, in the order given."""

        def moved(old: Tensor) -> Tensor:
            new = _zeros(old, old.shape[0], capacity, *old.shape[2:])
            new[:, : len(pages)] = old[:, pages]
            return new

        return moved(self.keys), moved(self.values)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, `(source, target)` each: the write half of copy-on-write."""
        for source, target in pairs:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    def write(self, keys: Tensor, values: Tensor, slot: int) -> None:
        """Write neighbouring tokens.

        Args:
            keys: `(kv_heads, tokens, key_dim)`.
            values: `(kv_heads, tokens, value_dim)`.
            slot: first token slot in the pool.
        """
        stop = slot + keys.shape[1]
        self.keys.flatten(1, 2)[:, slot:stop] = keys
        self.values.flatten(1, 2)[:, slot:stop] = values

    def read(self, stretch: Stretch, copy: bool = False) -> tuple[Tensor, Tensor]:
        """K and V of a stretch, `(kv_heads, tokens, head_dim)` each: views (later writes show), or copies."""
        part = slice(stretch.slot, stretch.slot + stretch.length)
        keys, values = self.keys.flatten(1, 2)[:, part], self.values.flatten(1, 2)[:, part]
        return (keys.clone(), values.clone()) if copy else (keys, values)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the named slots.

        Args:
            slots: `(batch, tokens)`, token slots in the pool.

        Returns:
            K and V, `(batch, kv_heads, tokens, head_dim)` each.
        """
        flat = slots.reshape(-1)

        def pick(stored: Tensor) -> Tensor:
            if stored.shape[1] == 0:  # only padding was fed yet
                return stored.new_zeros(slots.shape[0], stored.shape[0], slots.shape[1], stored.shape[-1])
            found = stored.flatten(1, 2).index_select(1, flat)
            return found.view(stored.shape[0], *slots.shape, stored.shape[-1]).transpose(0, 1)

        return pick(self.keys), pick(self.values)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros that may be written outside `torch.inference_mode` too, wherever the cache was started."""
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def page_bytes(keys: Tensor, values: Tensor, page_size: int) -> int:
    """Bytes of one page for states `(batch, kv_heads, seq, head_dim)`, before anything is allocated."""
    return page_size * sum(t.shape[1] * t.shape[-1] * t.element_size() for t in (keys, values))


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
