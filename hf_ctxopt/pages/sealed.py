"""The bytes of sealed pages: codes and scales of one part (K or V) of one layer. A sealed page is written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .codec import Codec

_PIECE = 64  # pages encoded or decoded at once: bounds the float32 copies


@dataclass(frozen=True)
class Codecs:
    """How a cache stores full pages.

    Args:
        keys: codec of K; 16 bits keep the model's dtype.
        values: codec of V.
        rotate_keys: whether K is kept in the turned basis (see `rotation.py`), open pages too.
        rotate_values: likewise V.
        open_first: leading pages of each row that stay open: those of the attention sinks.
    """

    keys: Codec
    values: Codec
    rotate_keys: bool = False
    rotate_values: bool = False
    open_first: int = 1

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of K and of V."""
        return self.keys.bits, self.values.bits

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise `ConfigError` unless states `(..., head_dim)` of these sizes can be packed."""
        for name, codec, states in (("k", self.keys, keys), ("v", self.values, values)):
            if states.shape[-1] % codec.planes:
                allowed = (
                    f"more bits, or 16: head size {states.shape[-1]} does not fill whole bytes at {codec.bits} bits"
                )
                raise ConfigError(f"kv_bits[{name!r}]", codec.bits, allowed)

    def page_bytes(self, keys: Tensor, values: Tensor, page_size: int) -> int:
        """Bytes of one sealed page for states `(batch, kv_heads, seq, head_dim)`."""
        parts = ((self.keys, keys), (self.values, values))
        return sum(t.shape[1] * codec.page_bytes(page_size, t.shape[-1], t.element_size()) for codec, t in parts)


class SealedPart:
    """K or V of all sealed pages of one layer.

    Args:
        codec: how they are stored.
        like: states `(batch, kv_heads, seq, head_dim)`: gives heads, size, dtype and device.
        page_size: tokens of a page.
        capacity: pages.
    """

    def __init__(self, codec: Codec, like: Tensor, page_size: int, capacity: int) -> None:
        self.codec, self.dtype = codec, like.dtype
        heads, head_dim = like.shape[1], like.shape[-1]
        with torch.inference_mode(False):
            shape = codec.code_shape(page_size, head_dim)
            self.codes = like.new_zeros((heads, capacity, *shape), dtype=codec.code_dtype(like.dtype))
            scales = codec.scale_shape(page_size, head_dim)
            self.scales = like.new_zeros((heads, capacity, *scales), dtype=torch.float16)

    @classmethod
    def of_states(cls, states: Tensor) -> SealedPart:
        """All pages of `(kv_heads, pages, page_size, head_dim)` as they are, at 16 bits, without a copy."""
        heads, _, page_size, head_dim = states.shape
        part = cls(Codec(16, over_tokens=True), states.new_empty(1, heads, 0, head_dim), page_size, 0)
        part.codes = states
        part.scales = part.scales.new_empty((heads, states.shape[1], *part.scales.shape[2:]))
        return part

    @property
    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [self.codes, self.scales]

    def moved(self, pages: list[int] | slice, capacity: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of `capacity` pages that begin with copies of the listed ones."""
        grown = []
        for old in self.tensors:
            with torch.inference_mode(False):
                new = old.new_zeros((old.shape[0], capacity, *old.shape[2:]))
            kept = old[:, pages]
            new[:, : kept.shape[1]] = kept
            grown.append(new)
        return grown[0], grown[1]

    def recoded(self, codec: Codec, turn: Callable[[Tensor], Tensor]) -> SealedPart:
        """The same pages in another codec, piece by piece; this part stays as it is.

        Args:
            codec: how they are stored then.
            turn: brings states into the basis that they are stored in then.
        """
        heads, capacity, page_size, _ = self.codes.shape
        head_dim = self.codes.shape[-1] * self.codec.planes
        made = SealedPart(codec, self.codes.new_empty((1, heads, 0, head_dim), dtype=self.dtype), page_size, capacity)
        for first in range(0, capacity, _PIECE):
            made.write(first, turn(self._decode(first, min(first + _PIECE, capacity))))
        return made

    def write(self, page: int, states: Tensor) -> None:
        """Encode `(kv_heads, pages, page_size, head_dim)` into neighbouring pages from `page` on."""
        for first in range(0, states.shape[1], _PIECE):
            codes, scales = self.codec.encode(states[:, first : first + _PIECE])
            part = slice(page + first, page + first + codes.shape[1])
            self.codes[:, part] = codes
            self.scales[:, part] = scales

    def write_at(self, pages: list[int], states: Tensor) -> None:
        """Encode `(kv_heads, pages, page_size, head_dim)` into the listed pages."""
        self.codes[:, pages], self.scales[:, pages] = self.codec.encode(states)

    def read(self, page: int, count: int) -> Tensor:
        """The states of neighbouring pages, `(kv_heads, pages, page_size, head_dim)`: a view at 16 bits."""
        if count <= _PIECE or self.codec.bits == 16:
            return self._decode(page, page + count)
        first = self._decode(page, page + _PIECE)
        found = first.new_empty(first.shape[0], count, *first.shape[2:])
        found[:, :_PIECE] = first
        for start in range(_PIECE, count, _PIECE):
            stop = min(start + _PIECE, count)
            found[:, start:stop] = self._decode(page + start, page + stop)
        return found

    def _decode(self, page: int, stop: int) -> Tensor:
        return self.codec.decode(self.codes[:, page:stop], self.scales[:, page:stop], self.dtype)
