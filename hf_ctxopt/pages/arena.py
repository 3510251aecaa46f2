"""Pages and storages of the layers of a group, which one page table lists, or several.

A cache of its own has arenas of its own. The caches of a prefix store (`caches/store.py`) share theirs: each has its
own rows, and the store's tree lists pages as well. Every listing is one reference.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from .plan import Pages
from .pool import SEALED, PagePool
from .rows import Row
from .sealed import Codecs
from .storage import LayerStorage, unique_bytes


class Listing(Protocol):
    """Somebody who lists an arena's pages."""

    def listed(self) -> Iterable[int]:
        """Every page it lists, as often as it does."""

    def renumber(self, places: Mapping[int, int]) -> None:
        """Pages have moved: `places` gives the new number of each that has."""


class Table:
    """The rows of one layer group. They may outlive it, until their pages are given back."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def listed(self) -> Iterable[int]:
        """Every page of every row."""
        return (page for row in self.rows for _, page in row.pages())

    def renumber(self, places: Mapping[int, int]) -> None:
        """See `Listing`."""
        for row in self.rows:
            pairs, row.runs = list(row.pages()), []
            for logical, page in pairs:
                row.add(logical, places.get(page, page))


class Arena:
    """Page pools and layer storages.

    Args:
        layers: indices of the layers.
        page_size: tokens of a page.
        codecs: how full pages are stored; `None` leaves all pages open.
        shared: whether more than one table lists the pages. Then a step does not move them to give memory back (see
            `compaction.py`).

    Attributes:
        storage_version: grows whenever a layer's storage lies elsewhere.
        uneven: whether layers may store their sealed pages differently: re-encoding them was cut short.
        listings: whoever lists pages.
        reclaim: asked for so many pages when the budget has no room for a step; returns whether it freed any.
    """

    def __init__(
        self, layers: Sequence[int], page_size: int, codecs: Codecs | None = None, shared: bool = False
    ) -> None:
        self.layers, self.page_size, self.codecs, self.shared = tuple(layers), page_size, codecs, shared
        self.pool, self.sealed = PagePool(), PagePool(first=SEALED)
        self.storages: dict[int, LayerStorage] = {}
        self.storage_version = 0
        self.uneven = False
        self.listings: list[Listing] = []
        self.reclaim: Callable[[int], bool] | None = None
        self._left: deque[Listing] = deque()
        self._guess = Pages(0, 0)  # bytes of one layer's pages

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        """A copied cache has its own pages, but a shared arena stays shared."""
        if self.shared:
            return self
        from copy import deepcopy

        twin = Arena(self.layers, self.page_size, self.codecs)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, deepcopy(value, memo))
        return twin

    # ---- sizes

    @property
    def page_bytes(self) -> int:
        """Bytes of one open page over all layers; layers that have not arrived count as the first one did."""
        known = sum(storage.page_bytes for storage in list(self.storages.values()))
        return known + (len(self.layers) - len(self.storages)) * self._guess.open

    @property
    def sealed_bytes(self) -> int:
        """Bytes of one sealed page over all layers, counted likewise."""
        known = sum(storage.sealed_bytes for storage in list(self.storages.values()))
        return known + (len(self.layers) - len(self.storages)) * self._guess.sealed

    def expect_page_bytes(self, one_layer: Pages) -> bool:
        """Take the layers that have not arrived for as large as `one_layer`; returns whether they were so already."""
        known = self._guess in (one_layer, (0, 0))
        self._guess = one_layer
        return known

    def bytes_of(self, pages: Pages) -> int:
        """Bytes of so many pages over all layers."""
        return pages.open * self.page_bytes + pages.sealed * self.sealed_bytes

    @property
    def capacity(self) -> Pages:
        """Pages that exist, free or not."""
        return Pages(self.pool.capacity, self.sealed.capacity)

    @property
    def used(self) -> Pages:
        """Pages that somebody lists."""
        return Pages(self.pool.used, self.sealed.used)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages really held."""
        return unique_bytes([tensor for storage in list(self.storages.values()) for tensor in storage.tensors])

    # ---- references

    def pool_of(self, page: int) -> PagePool:
        """The pool that counts `page`."""
        return self.pool if page < SEALED else self.sealed

    def share(self, pages: Iterable[int]) -> None:
        """One more listing of each page."""
        for page in pages:
            self.pool_of(page).share([page])

    def release(self, pages: Iterable[int]) -> None:
        """One listing of each page less."""
        for page in pages:
            self.pool_of(page).release([page])

    def leave(self, listing: Listing) -> None:
        """The listing's owner is gone. May be called while the garbage collector runs, at any point of the program."""
        self._left.append(listing)

    def collect(self) -> None:
        """Give back the pages of those who have left. Called between steps only."""
        while self._left:
            listing = self._left.popleft()
            if listing in self.listings:
                self.listings.remove(listing)
                self.release(list(listing.listed()))

    def holders(self) -> tuple[dict[int, int], dict[int, int]]:
        """Page → number of listings, counted anew: of open and of sealed pages."""
        counts = Counter(page for listing in self.listings for page in listing.listed())
        sealed = {page: count for page, count in counts.items() if page >= SEALED}
        return {page: count for page, count in counts.items() if page < SEALED}, sealed

    def renumber(self, places: Mapping[int, int]) -> None:
        """Tell everybody who lists pages that some have moved, all at once."""
        for listing in self.listings:
            listing.renumber(places)

    def clear(self) -> None:
        """Forget every page and give the memory back."""
        self.pool, self.sealed, self.storages = PagePool(), PagePool(first=SEALED), {}
        self.storage_version += 1
