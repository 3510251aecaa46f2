"""A radix tree of token runs over pages: match, insert, split, lock, evict.

Source: RadixAttention (Zheng et al. 2023, arXiv 2312.07104) and SGLang's `radix_cache.py`, with whole pages as the
unit. Tokens are compared, never hashes alone. The tree knows nothing of tensors: it keeps an item for every page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import IntegrityError
from .eviction import Queue
from .radix_check import violations
from .radix_node import DEFAULT_PRIORITY, Node, Page

Item = TypeVar("Item")

__all__ = ["DEFAULT_PRIORITY", "Inserted", "Match", "Node", "RadixTree"]


@dataclass(frozen=True)
class Match(Generic[Item]):
    """The longest beginning of a text that the tree has.

    Args:
        items: of its whole pages.
        node: the node that ends with the last of them; the namespace's root if there is none.
        tokens: of its whole pages.
        partial: an item whose page goes on like the text for some tokens more, and how many.
    """

    items: list[Item]
    node: Node[Item]
    tokens: int
    partial: tuple[Item, int] | None


@dataclass(frozen=True)
class Inserted(Generic[Item]):
    """What became of an insertion.

    Args:
        existing: leading pages that the tree had; their new items were not taken.
        node: the node that ends with the last page.
    """

    existing: int
    node: Node[Item]


class RadixTree(Generic[Item]):
    """Texts of many namespaces, as pages.

    Args:
        page_size: tokens of a page.
        clock: seconds, for priorities that end.
    """

    def __init__(self, page_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.page_size, self.clock = page_size, clock
        self._roots: dict[Hashable, Node[Item]] = {}
        self._uses = 0
        self.pages = self.resident_pages = self.locked_pages = 0
        self._resident = Queue[Item](self.clock, away=False)
        self._away = Queue[Item](self.clock, away=True)

    @property
    def tokens(self) -> int:
        """Tokens of all pages."""
        return self.pages * self.page_size

    # ---- texts

    def match(self, namespace: Hashable, tokens: Sequence[int], limit: int | None = None) -> Match[Item]:
        """The longest beginning of `tokens` that is here. Counts as a use of it.

        Args:
            namespace: texts of others are never found.
            tokens: the text.
            limit: most tokens to match.
        """
        most = len(tokens) if limit is None else max(0, min(limit, len(tokens)))
        text = self._cut(tokens, most)
        node, count = self._walk(namespace, text)
        self._touch(node)
        items = [item for one in node.path() for item in one.items]
        rest = tuple(tokens[count * self.page_size : most])
        return Match(items, node, count * self.page_size, self._partial(node, rest))

    def insert(
        self,
        namespace: Hashable,
        tokens: Sequence[int],
        items: Sequence[Item],
        priorities: Sequence[int | None] | None = None,
        durations: Sequence[float | None] | None = None,
        steps_to_next: int | None = None,
        merge: Callable[[Item, Item], Item] | None = None,
    ) -> Inserted[Item]:
        """Add a text of whole pages.

        Args:
            namespace: where it belongs.
            tokens: `page_size` for each item.
            items: one for each page.
            priorities: of each page; `None` leaves what it is. New values override old ones.
            durations: seconds after the last use for which a priority that is given holds; `None` for ever.
            steps_to_next: turns of others until this text is expected to go on.
            merge: makes the new, resident item of a page that is here already, from the old one and the given one.
        """
        text = self._cut(tokens, len(items) * self.page_size)
        worth = list(priorities) if priorities is not None else [None] * len(items)
        spans: list[float | None] = list(durations) if durations is not None else [None] * len(items)
        node, count = self._walk(namespace, text)
        self._touch(node)  # before the new values: what they replace may be over
        at = 0
        for one in node.path():
            for place in range(len(one.items)):
                if merge is not None:
                    one.items[place] = merge(one.items[place], items[at])
                if worth[at] is not None:
                    one.priorities[place], one.durations[place] = int(worth[at] or 0), spans[at]
                at += 1
        if count < len(items):
            values = [DEFAULT_PRIORITY if value is None else value for value in worth[count:]]
            child = Node(node, text[count:], list(items[count:]), values, spans[count:])
            child.last_time = self.clock()
            node.add(child)
            if node.parent is None:
                self._roots[namespace] = node
            node = child
            self.pages += len(child.items)
            self.resident_pages += len(child.items)
        node.steps = steps_to_next
        if merge is not None:
            self.settle(node)
        self._touch(node)
        for one in node.path():
            self._offer(one)  # whose worth may have fallen
        return Inserted(count, node)

    def walk(self) -> Iterator[Node[Item]]:
        """Every node with pages, parents before children."""
        waiting = [child for root in self._roots.values() for child in root.kids()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.kids())

    def roots(self) -> list[tuple[Hashable, Node[Item]]]:
        """What each namespace's texts hang on."""
        return list(self._roots.items())

    def clear(self) -> None:
        """Forget everything, locked or not: locks end without effect."""
        for node in self.walk():
            node.alive = False
        self._roots.clear()
        self.pages = self.resident_pages = self.locked_pages = 0
        self._resident.clear()
        self._away.clear()

    # ---- locks

    def lock(self, node: Node[Item]) -> None:
        """Keep the node and all before it from eviction; once more for every call."""
        if node.alive:
            node.handles += 1
            now = self.clock()
            for one in node.path():
                one.expire(now)
                self.locked_pages += len(one.items) if one.locks == 0 else 0
                one.locks += 1

    def unlock(self, node: Node[Item]) -> None:
        """Take one lock back.

        Raises:
            IntegrityError: the node is not locked, or only by way of those behind it.
        """
        if not node.alive:
            return
        if node.handles < 1:
            raise IntegrityError("a node of the radix tree is unlocked more often than locked")
        node.handles -= 1
        now = self.clock()
        for one in node.path():
            one.locks -= 1
            if one.locks == 0:
                self.locked_pages -= len(one.items)
                one.last_time = now
                self._offer(one)

    # ---- eviction

    def evict(self, pages: int, away: Callable[[Item, int], Item | None] | None = None) -> list[Item]:
        """Give up resident pages: leaves first, of the lowest priority, then the least recently used.

        Args:
            pages: how many at most.
            away: offers an item and its priority a place in the second tier; returns the item as it lies there, or
                `None` to drop it.

        Returns:
            The items that the tree no longer has. Those behind a dropped page in the second tier are among them.
        """
        gone: list[Item] = []
        for _ in range(pages):
            node = self._resident.pop()
            if node is None:
                break
            place = node.resident - 1
            try:
                moved = None if away is None else away(node.items[place], node.priority(place, self.clock()))
            except BaseException:
                self._offer(node)
                raise
            node.resident = place
            self.resident_pages -= 1
            if moved is not None:
                node.items[place] = moved
                self._offer(node)
            else:
                gone.extend(self._drop_from(node, place))
            if place == 0 and node.parent is not None:
                self._offer(node.parent)
        return gone

    def evict_away(self, pages: int) -> list[Item]:
        """Give up pages of the second tier, in the same order; returns their items."""
        gone: list[Item] = []
        for _ in range(pages):
            node = self._away.pop()
            if node is None:
                break
            gone.extend(self._drop_from(node, len(node.items) - 1))
        return gone

    def settle(self, node: Node[Item]) -> None:
        """All items up to the node's end are resident again: the caller has put resident ones in their place."""
        for one in node.path():
            self.resident_pages += len(one.items) - one.resident
            one.resident = len(one.items)
            self._offer(one)

    def _drop_from(self, node: Node[Item], place: int) -> list[Item]:
        """Remove the node's pages from `place` on, and everything behind the node."""
        behind, waiting = [], list(node.kids())
        while waiting:  # not a recursion: a conversation is a chain of a node for each turn
            behind.append(waiting.pop())
            waiting.extend(behind[-1].kids())
        gone = [item for one in reversed(behind) for item in self._cut_from(one, 0)] + self._cut_from(node, place)
        self._offer(node.parent if place == 0 and node.parent is not None else node)
        self._resident.tidy()
        self._away.tidy()
        return gone

    def _cut_from(self, node: Node[Item], place: int) -> list[Item]:
        """Remove the pages of a childless node from `place` on, and the node and its namespace if none is left."""
        parent = node.parent
        if place == 0 and parent is not None:
            parent.remove(node)
            node.alive = False
            if parent.parent is None and not parent.children:
                del self._roots[node.namespace]
        gone = [node.cut() for _ in range(len(node.items) - place)]
        self.pages -= len(gone)
        return gone

    def _offer(self, node: Node[Item]) -> None:
        self._resident.offer(node)
        self._away.offer(node)

    def missing_leaves(self) -> list[str]:
        """Leaves that could go and that no queue would ever name."""
        queues = {"resident": self._resident, "second": self._away}
        return [
            f"the node at {node.start} is a leaf of the {name} tier and not in its queue"
            for name, queue in queues.items()
            for node in queue.missing(self.walk())
        ]

    def check_integrity(self) -> None:
        """Walk the tree and recompute every counter.

        Raises:
            IntegrityError: something disagrees.
        """
        found = violations(self)
        if found:
            raise IntegrityError("; ".join(found))

    # ---- search

    def _cut(self, tokens: Sequence[int], most: int) -> list[Page]:
        size = self.page_size
        return [tuple(tokens[start : start + size]) for start in range(0, most - size + 1, size)]

    def _walk(self, namespace: Hashable, text: list[Page]) -> tuple[Node[Item], int]:
        """The node that ends with the last page of `text` that is here (cut so that it does), and their number."""
        node, count = self._roots.get(namespace), 0
        if node is None:  # a root that the tree has once something hangs on it
            node = Node(None, [], [], [], [])
            node.namespace = namespace
        while count < len(text):
            child = node.child(text[count])
            if child is None:
                break
            same = 1
            while same < len(child.pages) and count + same < len(text) and child.pages[same] == text[count + same]:
                same += 1
            count += same
            if same < len(child.pages):
                upper = child.split(same)
                self._offer(child)
                return upper, count
            node = child
        return node, count

    def _partial(self, node: Node[Item], rest: Page) -> tuple[Item, int] | None:
        near = node.nearest(rest)
        return None if near is None else (near[0].items[0], near[1])

    def _touch(self, node: Node[Item]) -> None:
        self._uses += 1
        now = self.clock()
        for one in node.path():
            one.expire(now)
            one.last_use, one.last_time = self._uses, now
        self._offer(node)
