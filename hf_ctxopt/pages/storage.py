"""The bytes: K and V of all pages of one layer, open ones in the model's dtype, sealed ones as their codec says.

Storage is `(kv_heads, pages, page_size, head_dim)`, so pages that neighbour in the pool are neighbouring tokens for
every head: a stretch of them is a plain `(kv_heads, tokens, head_dim)` view, read without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.dispatch import gather_kernel, seal_kernel
from ..kernels.native.attend import AllPages, Place
from ..kernels.paged import PagedStates, SealedPages
from ..kernels.sealed import SealedSegment, SealedTokens
from .pool import KINDS, SEALED
from .rotation import rotate_channels, rotation_matrix
from .rows import Stretch
from .sealed import Codecs, SealedPart

_SEALED_AT_ONCE = 64


class LayerStorage:
    """K and V of one layer. Made from the first tensors that arrive, never from a config.

    Args:
        keys: first key states, `(batch, kv_heads, seq, key_dim)`: gives heads, size, dtype and device.
        values: first value states, `(batch, kv_heads, seq, value_dim)`.
        page_size: tokens of a page.
        capacity: open pages.
        codecs: how full pages are stored; `None` leaves all pages open.
        sealed: sealed pages.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, page_size: int, capacity: int, codecs: Codecs | None = None,
        sealed: int = 0,
    ) -> None:  # fmt: skip
        self.page_size, self.codecs = page_size, codecs
        self.keys = self._new(keys, capacity)
        self.values = self._new(values, capacity)
        self.parts: list[SealedPart] = []
        if codecs is not None:
            both = ((codecs.keys, keys), (codecs.values, values))
            self.parts = [SealedPart(codec, like, page_size, sealed) for codec, like in both]

    def _new(self, like: Tensor, capacity: int) -> Tensor:
        # Zeros, not empty: padding columns gather slot 0, and 0 x NaN would poison a masked-out product.
        return _zeros(like, like.shape[1], capacity, self.page_size, like.shape[-1])

    @property
    def capacity(self) -> int:
        """Open pages allocated."""
        return self.keys.shape[1]

    @property
    def sealed_capacity(self) -> int:
        """Sealed pages allocated."""
        return self.parts[0].codes.shape[1] if self.parts else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Open and sealed pages allocated."""
        return self.capacity, self.sealed_capacity

    @property
    def codec_bits(self) -> tuple[int, int] | None:
        """Bits of sealed K and V; `None` where pages are never sealed."""
        return None if self.codecs is None else self.codecs.bits

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds keys or values."""
        return [tensor for kind in KINDS for tensor in self.kept(kind)]

    def kept(self, kind: str) -> list[Tensor]:
        """Every tensor of the pages of a kind (of `KINDS`), page by page along dimension 1."""
        if kind == KINDS[0]:
            return [self.keys, self.values]
        return [tensor for part in self.parts for tensor in part.tensors]

    @staticmethod
    def kept_shapes(
        heads_dims: tuple[int, int, int], page_size: int, codecs: Codecs | None
    ) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of one page in the tensors of `kept`, for `(kv_heads, key_dim, value_dim)`."""
        heads, *dims = heads_dims
        found: dict[str, list[tuple[int, ...]]] = {KINDS[0]: [(heads, page_size, dim) for dim in dims]}
        if codecs is not None:
            both = zip((codecs.keys, codecs.values), dims, strict=True)
            found[KINDS[1]] = [
                (heads, *shape)
                for codec, dim in both
                for shape in (codec.code_shape(page_size, dim), codec.scale_shape(page_size, dim))
            ]
        return found

    @property
    def paged(self) -> PagedStates:
        """The pages as kernels read them."""
        if not self.sealed_capacity:
            return PagedStates(self.keys, self.values)
        keys, values = self.parts
        return PagedStates(self.keys, self.values, SealedPages(keys.codes, keys.scales, values.codes, values.scales))

    @property
    def page_bytes(self) -> int:
        """Bytes of one open page's K and V."""
        return sum(t.shape[0] * t.shape[2] * t.shape[3] * t.element_size() for t in (self.keys, self.values))

    @property
    def sealed_bytes(self) -> int:
        """Bytes of one sealed page's K and V, scales included."""
        # Of the tensors, in which there may be no page yet.
        return sum(t.shape[0] * math.prod(t.shape[2:]) * t.element_size() for t in self.kept(KINDS[1]))

    def resize(self, capacity: int, sealed: int = 0) -> None:
        """Allocate `capacity` open and `sealed` sealed pages and keep the contents of those that remain.

        A kind is allocated before any of it is replaced: an allocation that fails leaves it as it was.
        """
        if self.parts and sealed != self.sealed_capacity:
            moved = [part.moved(slice(min(sealed, self.sealed_capacity)), sealed) for part in self.parts]
            for part, (codes, scales) in zip(self.parts, moved, strict=True):
                part.codes, part.scales = codes, scales
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

    def compacted_sealed(self, pages: list[int], capacity: int) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of K and of V for `capacity` sealed pages that begin with copies of the listed ones."""
        return [part.moved([page - SEALED for page in pages], capacity) for part in self.parts]

    def close_all(self, pages: int, keys: Tensor, values: Tensor, codecs: Codecs) -> None:
        """Take the first open pages for sealed ones of the same numbers, without a copy; others become the open ones.

        Args:
            pages: how many.
            keys: the new open pages' keys, `(kv_heads, pages, page_size, key_dim)` (see `compacted`).
            values: their values.
            codecs: of 16 bits.
        """
        self.parts = [SealedPart.of_states(states[:, :pages]) for states in (self.keys, self.values)]
        self.keys, self.values, self.codecs = keys, values, codecs

    def recode(self, codecs: Codecs) -> None:
        """Store the sealed pages, K and then V, by other codecs, and the open ones in their basis.

        An allocation that fails leaves a part as it was; the one before has changed, and both can be read.
        """
        for at, (name, turns) in enumerate((("keys", "rotate_keys"), ("values", "rotate_values"))):
            held, codec, stored = self.codecs, getattr(codecs, name), getattr(self, name)
            if held is None or (getattr(held, name), getattr(held, turns)) == (codec, getattr(codecs, turns)):
                continue
            turn = _turn(getattr(held, turns), getattr(codecs, turns))
            part, opened = self.parts[at].recoded(codec, turn), _zeros(stored, *stored.shape)
            opened.copy_(turn(stored))
            self.parts[at] = part
            setattr(self, name, opened)
            self.codecs = replace(held, **{name: codec, turns: getattr(codecs, turns)}, open_first=codecs.open_first)

    def seal(self, pairs: list[tuple[int, int]]) -> None:
        """Encode full open pages into sealed ones, `(open, sealed)` each."""
        if not pairs:
            return
        kernel = seal_kernel(self.keys.device)
        if kernel is not None and all(part.codec.bits < 16 for part in self.parts):
            margins = self.parts[0].codec.margin, self.parts[1].codec.margin
            numbers = torch.tensor([(page, sealed - SEALED) for page, sealed in pairs], dtype=torch.int32)
            kernel(self.paged, numbers, margins)
            return
        for start in range(0, len(pairs), _SEALED_AT_ONCE):
            some = pairs[start : start + _SEALED_AT_ONCE]
            for part, stored in zip(self.parts, (self.keys, self.values), strict=True):
                part.write_at([sealed - SEALED for _, sealed in some], stored[:, [page for page, _ in some]])

    def fill(self, page: int, sealed: int, keys: Tensor, values: Tensor) -> None:
        """Encode an open page and the new tokens that fill it up into a sealed one; the open page is not written.

        Args:
            page: the open page.
            sealed: the sealed page.
            keys: `(kv_heads, tokens, key_dim)`, the page's last tokens.
            values: `(kv_heads, tokens, value_dim)`.
        """
        for part, stored, new in zip(self.parts, (self.keys, self.values), (keys, values), strict=True):
            held = stored[:, page, : self.page_size - new.shape[1]]
            part.write(sealed - SEALED, torch.cat([held, new.to(held.dtype)], dim=1)[:, None])

    def close(self, page: int, sealed: int, tokens: int) -> None:
        """Encode an open page that holds `tokens` tokens, as if its last token filled it up."""
        keys, values = (stored[:, page, tokens - 1 : tokens] for stored in (self.keys, self.values))
        rest = self.page_size - tokens
        self.fill(page, sealed, keys.expand(-1, rest, -1), values.expand(-1, rest, -1))

    def reopen(self, sealed: int, page: int) -> None:
        """Decode a sealed page into an open one: its last tokens were taken back and others will follow."""
        for part, stored in zip(self.parts, (self.keys, self.values), strict=True):
            stored[:, page] = part.read(sealed - SEALED, 1)[:, 0]

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
            slot: first token slot in the pool; whole pages where it is one of a sealed page.
        """
        if slot >= SEALED * self.page_size:
            for part, states in zip(self.parts, (keys, values), strict=True):
                pages = states.unflatten(1, (-1, self.page_size))
                part.write(slot // self.page_size - SEALED, pages.to(part.dtype))
            return
        for stored, new in ((self.keys, keys), (self.values, values)):
            stored.flatten(1, 2).narrow(1, slot, new.shape[1]).copy_(new)

    def append(self, keys: Tensor, values: Tensor, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """Write the last token of a stretch of open pages and read the stretch, in as few operations as there are.

        Args:
            keys: `(1, kv_heads, 1, key_dim)`.
            values: `(1, kv_heads, 1, value_dim)`.
            stretch: the tokens held, the new one included.

        Returns:
            K and V, `(1, kv_heads, tokens, head_dim)`: views, as of `read`.
        """
        last = stretch.slot + stretch.length - 1
        found = []
        for stored, new in ((self.keys, keys), (self.values, values)):
            heads, pages, size, dim = stored.shape
            tokens = stored.view(1, heads, pages * size, dim)  # not -1, which torch cannot tell where dim is 0
            tokens.narrow(2, last, 1).copy_(new.detach() if new.requires_grad else new)
            found.append(tokens.narrow(2, stretch.slot, stretch.length))
        return found[0], found[1]

    def read(self, stretch: Stretch, copy: bool = False) -> tuple[Tensor, Tensor]:
        """K and V of a stretch, `(kv_heads, tokens, head_dim)` each: views (later writes show), or copies."""
        if stretch.sealed(self.page_size):
            keys, values = self._decode(stretch)
        else:
            part = slice(stretch.slot, stretch.slot + stretch.length)
            keys, values = self.keys.flatten(1, 2)[:, part], self.values.flatten(1, 2)[:, part]
        return (keys.clone(), values.clone()) if copy else (keys, values)

    def _decode(self, stretch: Stretch) -> tuple[Tensor, Tensor]:
        slot = stretch.slot - SEALED * self.page_size
        first, skip = divmod(slot, self.page_size)
        count = -(-(skip + stretch.length) // self.page_size)
        kernel = gather_kernel(self.keys.device)
        if kernel is not None and all(part.codec.bits < 16 for part in self.parts):
            shape = self.keys.shape[0], count * self.page_size
            keys, values = (like.new_empty((*shape, like.shape[-1])) for like in (self.keys, self.values))
            listed = torch.arange(-1 - first, -1 - first - count, -1, dtype=torch.int32, device=self.keys.device)
            kernel(self.paged, listed, 0, count, keys, values)
        else:
            keys, values = (part.read(first, count).flatten(1, 2) for part in self.parts)
        return keys[:, skip : skip + stretch.length], values[:, skip : skip + stretch.length]

    @property
    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """The bases that K and V are stored in, `(head_dim, head_dim)`; `None` for the model's own."""
        if self.codecs is None:
            return None, None
        asked = ((self.keys, self.codecs.rotate_keys), (self.values, self.codecs.rotate_values))
        keys, values = (rotation_matrix(t.shape[-1], t.device, t.dtype) if turn else None for t, turn in asked)
        return keys, values

    @property
    def all_pages(self) -> AllPages:
        """Open and sealed pages as the CPU's kernel reads them; there must be codecs."""
        keys, values = (
            SealedTokens(part.codes, part.scales, part.codec.bits, part.codec.over_tokens) for part in self.parts
        )
        return AllPages(self.keys, self.values, (keys, values))

    def place(self, stretch: Stretch) -> Place:
        """Where a stretch lies in `all_pages`."""
        sealed = stretch.sealed(self.page_size)
        return sealed, stretch.slot - (SEALED * self.page_size if sealed else 0), stretch.length

    def segment(self, stretch: Stretch, query: Tensor | None) -> SealedSegment:
        """A stretch of sealed pages as attention reads it; `query` as in `SealedSegment`."""
        first, skip = divmod(stretch.slot - SEALED * self.page_size, self.page_size)
        pages = slice(first, first - (-(skip + stretch.length) // self.page_size))
        keys, values = (
            SealedTokens(part.codes[:, pages], part.scales[:, pages], part.codec.bits, part.codec.over_tokens)
            for part in self.parts
        )
        return SealedSegment(keys, values, skip, stretch.length, query)

    def turned_query(self, query: Tensor) -> Tensor:
        """Queries `(..., key_dim)` in the basis of the stored keys."""
        return rotate_channels(query) if self.codecs is not None and self.codecs.rotate_keys else query

    def plain_values(self, mixed: Tensor) -> Tensor:
        """Weighted sums of stored values `(..., value_dim)` in the model's own basis."""
        return rotate_channels(mixed, back=True) if self.codecs is not None and self.codecs.rotate_values else mixed

    def plain(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored K and V `(..., head_dim)` in the model's own basis."""
        if self.codecs is None:
            return keys, values
        keys = rotate_channels(keys, back=True) if self.codecs.rotate_keys else keys
        return keys, rotate_channels(values, back=True) if self.codecs.rotate_values else values

    def turned(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `(..., head_dim)` in the basis they are stored in."""
        if self.codecs is None:
            return keys, values
        keys = rotate_channels(keys) if self.codecs.rotate_keys else keys
        return keys, rotate_channels(values) if self.codecs.rotate_values else values

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


def _turn(was: bool, now: bool) -> Callable[[Tensor], Tensor]:
    """What brings states from the basis they `was` turned to into the one that they shall be in `now`."""
    if was == now:
        return lambda states: states
    return lambda states: rotate_channels(states, back=was)


def page_bytes(keys: Tensor, values: Tensor, page_size: int) -> int:
    """Bytes of one page for states `(batch, kv_heads, seq, head_dim)`, before anything is allocated."""
    return page_size * sum(t.shape[1] * t.shape[-1] * t.element_size() for t in (keys, values))


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
