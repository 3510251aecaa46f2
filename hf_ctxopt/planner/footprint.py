"""Bytes of everything that is not a weight: keys and values, activations of a prompt, logits, context, reserve.

Keys and values are counted as `pages/` allocates them, to the byte. The other terms are estimates whose constants come
from one measurement (`benchmarks/results/gpu_fit_8gb.json`); `tests/planner/test_footprint.py` holds them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..pages.codec import Codec
from .facts import ModelFacts
from .layers import LayerShape
from .profiles import GIB
from .schemes import WeightBytes

GRAPH = 128 << 20
"""Bytes of a captured decode step and of the workspaces of cuBLAS (32 MiB for each stream on Hopper)."""
PIECE = 32 << 20
"""Bytes of quantized history that attention decodes at a time, K and V (`caches/chunk.py`), and its float32 copy."""
CHUNKS = (1024, 512, 256, 128)
"""Tokens of a prefill chunk, in the order they are tried (`integration/chunking.py` has the same bounds)."""
LARGE_CHUNK, LARGE_CARD = 2048, 24 * GIB
ENDLESS = 1 << 40  # tokens


def reserve_of(vram: int) -> int:
    """Bytes left alone by default: 1 GiB up to 8 GiB of memory, 12 % of more."""
    return GIB if vram <= 8 * GIB else max(GIB, vram * 12 // 100)


def chunks_for(vram: int) -> tuple[int, ...]:
    """Chunk sizes to try on a card, largest first."""
    return (LARGE_CHUNK, *CHUNKS) if vram >= LARGE_CARD else CHUNKS


@dataclass(frozen=True)
class KvLayout:
    """The pages of a cache for one model: how many there are and what each costs.

    Layers without a window of their own, or all of them if all have one, are the growing ones: `page_bytes` is one
    page over these. Everything else (pages of sliding layers, pages that stay open) is there from the start, in
    `fixed_bytes`.

    Args:
        groups: the model's attention layers.
        kv_bits: bits of K and of V.
        item: bytes of an element of the model's dtype.
        rows: sequences that are held.
        page_size: tokens of a page.
        sinks: first tokens kept, with `window`.
        window: last tokens kept by the full layers; `None` keeps all.
    """

    groups: tuple[LayerShape, ...]
    kv_bits: Mapping[str, int]
    item: int = 2
    rows: int = 1
    page_size: int = 32
    sinks: int = 0
    window: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether full pages are stored in fewer bits."""
        return any(bits < 16 for bits in self.kv_bits.values())

    @property
    def growing(self) -> tuple[LayerShape, ...]:
        """The layers whose pages grow with the text."""
        return tuple(group for group in self.groups if group.window is None) or self.groups

    @property
    def page_bytes(self) -> int:
        """Bytes of one full page over the growing layers."""
        return sum(self._page(group, self.quantized) for group in self.growing)

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of one full page of the growing layer that has the largest: what there is twice while pages grow."""
        return max(self._page(group, self.quantized) // group.layers for group in self.growing)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of what does not grow: full windows of sliding layers, where others grow, and pages that stay open."""
        total = 0
        for group in self.groups:
            sealed, opened = self._pages(ENDLESS, group)
            total += opened * self._page(group, False)
            total += 0 if group in self.growing else sealed * self._page(group, self.quantized)
        return self.rows * total

    def nbytes(self, tokens: int) -> int:
        """Bytes that rows of `tokens` tokens each allocate."""
        total = 0
        for group in self.groups:
            sealed, opened = self._pages(tokens, group)
            total += sealed * self._page(group, self.quantized) + opened * self._page(group, False)
        return self.rows * total

    def needed(self, tokens: int) -> int:
        """Growing pages over all rows for texts of `tokens` tokens, open ones left out where pages are quantized."""
        return self.rows * max(self._pages(tokens, group)[0] for group in self.growing)

    @property
    def bounded(self) -> bool:
        """Whether a window bounds every layer, so that a text of any length fits once the windows do."""
        return all(self._bound(group) is not None for group in self.groups)

    def tokens(self, pages: int) -> int | None:
        """Tokens of each row that `pages` growing pages hold; `None` for any number, because windows bound them."""
        if self.bounded and pages >= self.needed(ENDLESS):
            return None
        first = max(self._opened_first(group) for group in self.growing) if self.quantized else 0
        return (pages // self.rows + first) * self.page_size

    def _page(self, group: LayerShape, sealed: bool) -> int:
        """Bytes of a page of a group's layers."""
        if not sealed:
            return self.page_size * group.token_bytes(self.item)
        each = Codec(self.kv_bits["k"], over_tokens=True).page_bytes(self.page_size, group.key_dim, self.item)
        each += Codec(self.kv_bits["v"], over_tokens=False).page_bytes(self.page_size, group.value_dim, self.item)
        return group.layers * group.kv_heads * each

    def _pages(self, tokens: int, group: LayerShape) -> tuple[int, int]:
        """(growing, always open) pages of a row: as `pages/capacity.py` allocates them for a known length."""
        bound, pages = self._bound(group), -(-tokens // self.page_size)
        pages = pages if bound is None else min(pages, bound)
        if not self.quantized:
            return pages, 0
        first = self._opened_first(group)
        return max(0, pages - first), first + 1

    def _opened_first(self, group: LayerShape) -> int:
        """Leading pages that stay in the model's dtype: those of the sinks."""
        if self._bound(group) is None:
            return 1
        return -(-self.sinks // self.page_size) if self._cut(group) else 0

    def _cut(self, group: LayerShape) -> bool:
        """Whether sinks and window replace what the model itself keeps (`caches/sink.py`)."""
        if self.window is None:
            return False
        everywhere = all(other.window is not None for other in self.groups)
        return group.window is None or (everywhere and self.sinks + self.window <= group.window)

    def _bound(self, group: LayerShape) -> int | None:
        """Most pages of a row (`LayerGroup.row_bound`)."""
        cut = self._cut(group)
        window = self.window if cut else group.window
        if window is None:
            return None
        return (-(-self.sinks // self.page_size) if cut else 0) + -(-(window - 1) // self.page_size) + 1


def activation_bytes(facts: ModelFacts, weights: WeightBytes, layout: KvLayout, chunk: int, batch: int) -> int:
    """Bytes that reading a prompt needs beside weights and pages: the most of its moments.

    - a feed-forward layer: residual, norm, gate and up, and the unpacked matrix;
    - attention: residual, Q and its turned copy, K and V, the output and its float32 merge, and decoded history.
    """
    tokens, item = chunk * batch, facts.item
    queries = facts.heads * max(group.key_dim for group in facts.groups)
    states = max(group.kv_heads * (group.key_dim + group.value_dim) for group in facts.groups)
    mlp = tokens * item * 2 * (facts.hidden + facts.inner) + weights.unpacked
    attention = tokens * (item * (facts.hidden + 2 * queries + 2 * states) + 12 * queries)
    return max(mlp, attention + (PIECE if layout.quantized else 0))


def logit_bytes(facts: ModelFacts, batch: int) -> int:
    """Bytes of a step's logits: as computed, in float32, and what the processors make of them."""
    return batch * facts.vocab * (facts.item + 8)
