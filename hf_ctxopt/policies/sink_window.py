"""Attention sinks plus a sliding window, and llama.cpp's context shift.

Sources: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2; `streaming_llm/kv_cache.py`) for sinks and
window; llama.cpp `tools/server/server-context.cpp` for `n_keep` / `n_discard`.

A token is named by its index in its own row, 0 being the row's first real token. This module does not know about
pages, batches, padding or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SinkWindow:
    """Which tokens a query may see: the first `sinks`, and a recent stretch.

    Args:
        sinks: number of first tokens always kept.
        window: a query sees the last `window` tokens, itself included. `None` keeps everything.
        n_discard: `None` evicts one token per step. A number evicts that many at once whenever the
            `sinks + window` slots are full, as llama.cpp's context shift does; 0 means half of the non-sink tokens.
    """

    sinks: int = 0
    window: int | None = None
    n_discard: int | None = None

    @property
    def slides(self) -> bool:
        """Whether the horizon is a plain window, that is, moves with every token or never."""
        return self.n_discard is None

    def horizon(self, token: int) -> int:
        """Index of the oldest non-sink token that the query at index `token` may see.

        It never decreases with `token`, and depends on nothing else, so results do not depend on how a text is cut
        into chunks.
        """
        if self.window is None:
            return 0
        if self.n_discard is None:
            return self._trim(token - self.window + 1)
        size = self.sinks + self.window
        if token + 1 < size:
            return 0
        discard = self.shift_by
        return self.sinks + discard * ((token - (size - 1)) // discard + 1)

    def _trim(self, first: int) -> int:
        return first if first > self.sinks else 0

    @property
    def shift_by(self) -> int:
        """Tokens dropped by one context shift once `sinks + window` slots are full."""
        shift = context_shift(
            n_past=self.sinks + (self.window or 0) - 1,
            n_ctx=self.sinks + (self.window or 0),
            n_keep=self.sinks,
            n_discard=self.n_discard or 0,
        )
        return shift.n_discard if shift is not None else 0

    @property
    def most_held(self) -> int | None:
        """Largest number of non-sink tokens any query sees, itself included; `None` if unbounded."""
        return self.window


@dataclass(frozen=True)
class Shift:
    """One context shift: tokens `[n_keep, n_keep + n_discard)` go, later ones move down by `n_discard`."""

    n_keep: int
    n_discard: int


def context_shift(n_past: int, n_ctx: int, n_keep: int, n_discard: int = 0) -> Shift | None:
    """llama.cpp's arithmetic for one context shift.

    Args:
        n_past: tokens in the cache.
        n_ctx: slots in the cache.
        n_keep: first tokens to keep.
        n_discard: tokens to drop; 0 means half of those not kept.

    Returns:
        What to keep and drop, or `None` when the next token still fits.

    Source: llama.cpp, `server-context.cpp` (`n_left / 2` is an integer division; the clamp of `n_discard` is the one
    added by llama.cpp PR 24786).
    """
    if n_past + 1 < n_ctx:
        return None
    keep = min(n_ctx - 4, n_keep)
    left = n_past - keep
    discard = n_discard or left // 2
    return Shift(keep, min(max(discard, 0), max(0, left - 1)))
