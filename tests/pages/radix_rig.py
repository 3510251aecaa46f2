"""A radix tree beside an oracle without a tree: a dictionary of every cached page by all the text up to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

from hf_ctxopt.pages.radix import RadixTree
from hf_ctxopt.pages.radix_node import Node

Tokens = tuple[int, ...]
Place = tuple[Hashable, Tokens]
"""A namespace, and all tokens from the text's start to a page's end."""
DEFAULT = 35


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Page:
    """What the oracle knows of a page. `used`: number of the operation that used it last; `free_at`: when."""

    item: int
    priority: int = DEFAULT
    duration: float | None = None
    used: int = 0
    free_at: float = 0.0


class Checked:
    """Runs each operation on both and compares everything that can be seen."""

    def __init__(self, page_size: int, every: int = 1) -> None:
        self.clock, self.size, self.every = Clock(), page_size, every
        self.tree: RadixTree[int] = RadixTree(page_size, self.clock)
        self.pages: dict[Place, Page] = {}
        self.places: dict[int, Place] = {}
        self.children: Counter[Place] = Counter()
        self.locks: Counter[Place] = Counter()
        self.timed: set[Place] = set()
        self.handles: list[tuple[Node[int], Place]] = []
        self.numbers, self.operations = count(), 0

    # The oracle.

    def path(self, place: Place, start: int = 0) -> list[Place]:
        """The places of all pages up to `place`, from page `start` on."""
        return [(place[0], place[1][:end]) for end in range((start + 1) * self.size, len(place[1]) + 1, self.size)]

    def cached(self, namespace: Hashable, text: Tokens) -> Place:
        """The longest cached start of `text`."""
        end = 0
        while end + self.size <= len(text) and (namespace, text[: end + self.size]) in self.pages:
            end += self.size
        return namespace, text[:end]

    def longest_partial(self, place: Place, rest: Tokens) -> int:
        """Most tokens that a cached page after `place` has in common with `rest`."""
        best, (namespace, before) = 0, place
        for other, tokens in self.pages:
            if other == namespace and len(tokens) == len(before) + self.size and tokens[: len(before)] == before:
                same = 0
                for a, b in zip(tokens[len(before) :], rest, strict=False):
                    if a != b:
                        break
                    same += 1
                best = max(best, same)
        return best

    def begin(self) -> None:
        """Start an operation: priorities whose time is over fall back."""
        self.operations += 1
        for place in list(self.timed):
            page = self.pages[place]
            assert page.duration is not None
            if not self.locks[place] and page.free_at + page.duration <= self.clock.now:
                page.priority, page.duration = DEFAULT, None
                self.timed.discard(place)

    def use(self, place: Place) -> None:
        for one in self.path(place):
            self.pages[one].used, self.pages[one].free_at = self.operations, self.clock.now

    def forget(self, place: Place) -> None:
        page = self.pages.pop(place)
        del self.places[page.item]
        self.timed.discard(place)
        self.children[place[0], place[1][: -self.size]] -= 1

    def evictable(self) -> list[Place]:
        return [place for place in self.pages if not self.children[place] and not self.locks[place]]

    def order(self, place: Place) -> tuple[int, int]:
        return self.pages[place].priority, self.pages[place].used

    # Operations on both.

    def match(self, namespace: Hashable, text: Sequence[int], limit: int | None = None) -> Node[int]:
        self.begin()
        found = self.tree.match(namespace, text, limit=limit)
        cut = tuple(text if limit is None else text[:limit])
        place = self.cached(namespace, cut)
        assert found.tokens == len(place[1])
        assert found.items == [self.pages[one].item for one in self.path(place)]
        assert (found.node.namespace, tuple(found.node.text())) == place
        rest = cut[found.tokens : found.tokens + self.size]
        partial = found.partial
        assert (partial[1] if partial else 0) == self.longest_partial(place, rest)
        if partial:
            page = self.places[partial[0]]
            assert page[0] == namespace
            assert page[1][: len(page[1]) - self.size] == place[1]
            assert page[1][found.tokens :][: partial[1]] == rest[: partial[1]]
        self.use(place)
        self.compare()
        return found.node

    def insert(
        self,
        namespace: Hashable,
        text: Sequence[int],
        priorities: Sequence[int | None] | None = None,
        durations: Sequence[float | None] | None = None,
        merge: bool = False,
    ) -> Node[int]:
        self.begin()
        pages = len(text) // self.size
        whole = tuple(text[: pages * self.size])
        items = [next(self.numbers) for _ in range(pages)]
        held = self.cached(namespace, whole)
        found = self.tree.insert(
            namespace, whole, items, priorities=priorities, durations=durations, merge=max if merge else None
        )
        assert found.existing == len(held[1]) // self.size
        assert tuple(found.node.text()) == whole
        for index, place in enumerate(self.path((namespace, whole))):
            if place not in self.pages:
                self.pages[place] = Page(items[index])
                self.places[items[index]] = place
                self.children[place[0], place[1][: -self.size]] += 1
            elif merge:
                del self.places[self.pages[place].item]
                self.pages[place].item = items[index]
                self.places[items[index]] = place
            priority = priorities[index] if priorities else None
            if priority is not None:
                page, duration = self.pages[place], durations[index] if durations else None
                page.priority, page.duration = priority, duration
                (self.timed.discard if page.duration is None else self.timed.add)(place)
        self.use((namespace, whole))
        self.compare()
        return found.node

    def lock(self, node: Node[int]) -> None:
        self.begin()
        self.tree.lock(node)
        place = (node.namespace, tuple(node.text()))
        self.handles.append((node, place))
        self.locks.update(self.path(place))
        self.compare()

    def unlock(self, index: int) -> None:
        self.begin()
        node, place = self.handles.pop(index)
        self.tree.unlock(node)
        for one in self.path(place):
            self.locks[one] -= 1
            if not self.locks[one]:
                self.pages[one].free_at = self.clock.now
        self.compare()

    def evict(self, pages: int) -> None:
        self.begin()
        gone = self.tree.evict(pages)
        for item in gone:
            leaves = self.evictable()
            place = self.places[item]
            assert place in leaves
            assert self.order(place) == min(map(self.order, leaves))
            self.forget(place)
        assert len(gone) == pages or (len(gone) < pages and not self.evictable())
        self.compare()

    def clear(self) -> None:
        self.tree.clear()
        for place in list(self.pages):
            self.forget(place)
        self.handles, self.locks = [], Counter()
        self.compare()

    def compare(self) -> None:
        """The accounting identity after each operation; the walk after each `every`-th."""
        tree, held = self.tree, sum(1 for count in self.locks.values() if count > 0)
        assert tree.pages == len(self.pages) == len(self.places)
        assert tree.locked_pages == held
        assert tree.tokens == tree.resident_pages * self.size == tree.pages * self.size
        assert {namespace for namespace, _ in tree.roots()} == {namespace for namespace, _ in self.pages}
        if self.operations % self.every == 0:
            self.walk()

    def walk(self) -> None:
        """Integrity, every page's item, priority and lock count, and that each handle still means its text."""
        self.tree.check_integrity()
        seen = {}
        for node in self.tree.walk():
            path = self.path((node.namespace, tuple(node.text())), node.start // self.size)
            for index, (place, item) in enumerate(zip(path, node.items, strict=True)):
                page = self.pages[place]
                worth = page.priority
                if page.duration is not None and not self.locks[place]:
                    worth = worth if self.clock.now < page.free_at + page.duration else DEFAULT
                assert (item, node.priority(index, self.clock.now)) == (page.item, worth)
                assert node.locks == self.locks[place]
                seen[place] = item
        assert len(seen) == len(self.pages)
        for node, place in self.handles:
            assert node.alive
            assert tuple(node.text()) == place[1]
