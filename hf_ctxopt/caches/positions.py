"""Which positions the model was told, where they differ from the text's.

In float32 the angle of a rotary embedding loses a bit with every doubling of the position; past about 100 k
tokens logits drift. Attention only needs distances, so a long stream is cut into eras: within an era
positions count from the era's base, and a key of an older era is met by a query turned by the difference of
the bases (design §3).
"""

from __future__ import annotations

from bisect import bisect_right


class PositionLedger:
    """The eras of one cache.

    Columns (labels) count all text seen, padding included; the model is given `position - base`.

    Args:
        span: largest number of positions in an era; `None` never starts a new one.
    """

    def __init__(self, span: int | None = None) -> None:
        self.span = span
        self._starts = [0]
        self._bases = [0]
        self._opened: int | None = None

    @property
    def base(self) -> int:
        """Base of the current era."""
        return self._bases[-1]

    def open(self, seen: int, queries: int) -> int:
        """The base to subtract from the positions of the coming forward pass."""
        new = self._opened != seen and seen > self.base
        if self.span is not None and new and seen + queries - self.base > self.span:
            self._start(seen, seen)
        self._opened = seen
        return self.base

    def confirm(self, seen: int) -> None:
        """A forward pass has begun; if nobody opened it, its positions are the text's own."""
        if self._opened != seen and self.base != 0:
            self._start(seen, 0)

    def crop(self, seen: int) -> None:
        """Forget eras that begin at or after column `seen`."""
        keep = max(1, bisect_right(self._starts, seen - 1))
        self._starts, self._bases, self._opened = self._starts[:keep], self._bases[:keep], None

    def split(self, label: int, length: int) -> list[tuple[int, int, int]]:
        """Cut columns `[label, label + length)` at eras: `(first column, columns, base)` each."""
        if len(self._starts) == 1:
            return [(label, length, 0)]
        pieces: list[tuple[int, int, int]] = []
        stop = label + length
        at = max(0, bisect_right(self._starts, label) - 1)
        while label < stop:
            end = min(stop, self._starts[at + 1]) if at + 1 < len(self._starts) else stop
            pieces.append((label, end - label, self._bases[at]))
            label, at = end, at + 1
        return pieces

    def _start(self, seen: int, base: int) -> None:
        self.crop(seen)
        self._starts.append(seen)
        self._bases.append(base)
