"""Which pages exist, which are free, and how many holders each has.

The pool counts; it owns no tensor (see `storage.py`). A page has one reference for each table row that lists it;
a page without references is free. Source of the scheme: vLLM's `BlockPool` (Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import IntegrityError

SEALED = 1 << 40
"""Sealed pages are numbered from here on, open pages from 0."""
KINDS = ("o", "s")
"""Open and sealed pages, where a letter stands for the kind (in saved files too)."""


def kind_of(page: int) -> str:
    """Of `KINDS`."""
    return KINDS[page >= SEALED]


class PagePool:
    """Reference counts of a layer group's pages.

    Args:
        capacity: pages to start with.
        first: number of its first page; `SEALED` in the pool of sealed pages, so that a number tells the pool.
    """

    def __init__(self, capacity: int = 0, first: int = 0) -> None:
        self._refs: list[int] = [0] * capacity
        self._free, self.first = capacity, first

    @property
    def capacity(self) -> int:
        """Pages that exist, free or not."""
        return len(self._refs)

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return self._free

    @property
    def used(self) -> int:
        """Pages with at least one holder."""
        return self.capacity - self._free

    @property
    def shared(self) -> int:
        """Pages with more than one holder."""
        return sum(1 for count in self._refs if count > 1)

    def references(self, page: int) -> int:
        """Number of holders of `page`."""
        return self._refs[page - self.first]

    def resize(self, capacity: int) -> None:
        """Grow to `capacity` pages, or shrink to it; only free pages at the end can go.

        Raises:
            IntegrityError: a page that would go is held.
        """
        if any(self._refs[capacity:]):
            raise IntegrityError(f"cannot shrink the pool to {capacity} pages: later pages are held")
        self._free += capacity - self.capacity
        self._refs = self._refs[:capacity] + [0] * (capacity - len(self._refs))

    def take(self, count: int, after: int | None = None, leave_room: bool = True) -> list[int]:
        """Take `count` free pages, each with one reference.

        Pages that follow `after` come first, because neighbouring pages can be read as one stretch without a gather.

        Args:
            count: pages wanted; the caller has made sure that they are free.
            after: the page that precedes them in the text.
            leave_room: whether other rows may want to grow into the free pages behind their own.

        Raises:
            IntegrityError: fewer than `count` pages are free.
        """
        if count > self._free:
            raise IntegrityError(f"{count} pages asked of a pool with {self._free} free")
        pages: list[int] = []
        place = -1 if after is None else after - self.first + 1
        while len(pages) < count:
            if not 0 <= place < len(self._refs) or self._refs[place]:
                place = self._start_of_stretch(count - len(pages) if leave_room else self.capacity)
            self._refs[place] = 1
            pages.append(self.first + place)
            place += 1
        self._free -= count
        return pages

    def _start_of_stretch(self, wanted: int) -> int:
        """Where to take pages from the longest free stretch.

        A stretch behind held pages is where their row will grow: as much of its first half is left as can be.
        """
        best, best_length, start = -1, 0, -1
        for page, count in enumerate([*self._refs, 1]):
            if count == 0 and start < 0:
                start = page
            elif count and start >= 0:
                if page - start > best_length:
                    best, best_length = start, page - start
                start = -1
        return best + max(0, min(best_length // 2, best_length - wanted)) if best > 0 else best

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            if self._refs[page - self.first] == 0:
                raise IntegrityError(f"page {page} is free and cannot be shared")
            self._refs[page - self.first] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; pages without holders become free.

        Raises:
            IntegrityError: a page is free already (a double free).
        """
        for page in pages:
            place = page - self.first
            if self._refs[place] == 0:
                raise IntegrityError(f"page {page} is released twice")
            self._refs[place] -= 1
            self._free += self._refs[place] == 0

    def violations(self, held: dict[int, int]) -> list[str]:
        """What disagrees with `held` (page → holders, recomputed from the tables); empty when all is well."""
        found = [
            f"page {page} has {count} references, {held.get(page, 0)} holders"
            for page, count in enumerate(self._refs, self.first)
            if count != held.get(page, 0)
        ]
        found += [
            f"page {page} is held and does not exist" for page in held if not 0 <= page - self.first < self.capacity
        ]
        zero = self._refs.count(0)
        if zero != self._free:
            found.append(f"{self._free} pages counted free, {zero} are")
        return found

    def rebuild(self, held: dict[int, int]) -> None:
        """Set every count from `held`: the recovery after a violation outside debug mode."""
        self._refs = [held.get(page, 0) for page in range(self.first, self.first + self.capacity)]
        self._free = self._refs.count(0)
