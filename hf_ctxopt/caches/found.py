"""What a prefix store has of one text, and who keeps what was found."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pages.group import LayerGroup
from ..pages.radix import Node, RadixTree
from .slot import Slot


@dataclass(frozen=True)
class Found:
    """What the store has of one text.

    Args:
        slots: its first whole pages.
        tail: a page that goes on like the text for some tokens more, and how many.
        page_size: tokens of a page.
        node: the tree's node to lock while the pages are used; `None` where nothing was found.
    """

    slots: list[Slot]
    tail: tuple[Slot, int] | None
    page_size: int
    node: Node[Slot] | None = None

    @property
    def tokens(self) -> int:
        """Tokens found."""
        return len(self.slots) * self.page_size + (self.tail[1] if self.tail is not None else 0)

    def slot(self, page: int) -> Slot:
        """The slot of a logical page, of the begun one behind the whole ones too."""
        if page < len(self.slots) or self.tail is None:
            return self.slots[page]
        return self.tail[0]

    def longest(self, groups: Sequence[LayerGroup], most: int) -> int:
        """The longest beginning, at most `most` tokens, whose pages every layer still has as far as it looks back."""
        size, tokens = self.page_size, min(most, self.tokens)
        while tokens > 0:
            last = (tokens - 1) // size
            gap = max(
                (self._last_gap(index, group.policy.horizon(tokens) // size, last)
                 for index, group in enumerate(groups)), default=-1,
            )  # fmt: skip
            if gap < 0:
                break
            tokens = gap * size  # nothing that needs this page can be served
        return tokens

    def _last_gap(self, index: int, first: int, last: int) -> int:
        return next((page for page in range(last, first - 1, -1) if self.slot(page).pages[index] is None), -1)


class Lease:
    """The nodes that one cache keeps locked; it may outlive the cache until the store notices."""

    def __init__(self, cache: Any) -> None:
        self.nodes: list[Node[Slot]] = []
        self._cache = weakref.ref(cache)

    @property
    def movable(self) -> bool:
        """Whether the cache does not mind that its pages move: no step is under way, or may be taken back."""
        cache: Any = self._cache()
        if cache is None:
            return True
        return bool(cache.context.between_steps) and not any(group.begun for group in cache.groups)


class Listed:
    """The tree's pages in one arena (see `arena.Listing`)."""

    def __init__(self, tree: RadixTree[Slot], index: int) -> None:
        self._tree, self._index = tree, index

    def _slots(self) -> Iterable[Slot]:
        return (slot for node in self._tree.walk() for slot in node.items)

    def listed(self) -> Iterable[int]:
        return (page for slot in self._slots() if (page := slot.pages[self._index]) is not None)

    def renumber(self, places: Mapping[int, int]) -> None:
        for slot in self._slots():
            page = slot.pages[self._index]
            if page is not None:
                slot.pages[self._index] = places.get(page, page)
