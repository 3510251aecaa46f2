"""Which page of a radix tree goes next: a heap of leaves whose entries are checked when they come up.

A leaf has one entry that counts. It may come up too early, never too late: a use only makes a leaf go later, so it
costs nothing, and the entry is put right when it comes up. An eviction is O(log n).

Order: lowest priority; then, where it is known, the text that is expected to go on latest (KVFlow, arXiv 2507.07400);
then the least recently used. Only leaves are in it, as in TensorRT-LLM's `evictionPolicy.cpp`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from .radix_node import Node

Item = TypeVar("Item")
Key = tuple[int, float, int]
SLACK = 64
"""Entries that do not count which a heap may have beyond as many as do, before it is made anew."""


class Queue(Generic[Item]):
    """Leaves of one tier, the next to go first.

    Args:
        clock: seconds, for priorities that end.
        away: whether this is the second tier.
    """

    def __init__(self, clock: Callable[[], float], away: bool) -> None:
        self._clock, self._away = clock, away
        self._heap: list[tuple[Key, int, Node[Item]]] = []
        self._ends: list[tuple[float, int, Node[Item]]] = []  # when the priority of a leaf's last page ends
        self._keys: dict[int, Key] = {}  # of the entry that counts, by the identity of the node in it
        self._due: dict[int, float] = {}  # likewise of `_ends`
        self._last_size = 0
        self._numbers = itertools.count()
        self.draws = 0
        """Entries that have come up so far: the work done."""

    def clear(self) -> None:
        """Forget all."""
        self._heap, self._ends, self._keys, self._due = [], [], {}, {}

    def place(self, node: Node[Item]) -> int | None:
        """The node's page that would go next; `None` if none can."""
        if not node.alive or node.locks or node.parent is None:
            return None
        if self._away:
            leaf = node.resident < len(node.items) and not node.children
            return len(node.items) - 1 if leaf else None
        leaf = node.resident > 0 and all(child.resident == 0 for child in node.kids())
        return node.resident - 1 if leaf else None

    def key(self, node: Node[Item], place: int) -> Key:
        """The smaller, the sooner it goes."""
        return node.priority(place, self._clock()), -float(node.steps or 0), node.last_use

    def offer(self, node: Node[Item]) -> None:
        """The node may have become a leaf, or its worth has changed."""
        place = self.place(node)
        if place is None:
            return
        key, known = self.key(node, place), self._keys.get(id(node))
        if known is None or key < known:
            self._keys[id(node)] = key
            heapq.heappush(self._heap, (key, next(self._numbers), node))
        end, due = node.expiry(place), self._due.get(id(node))
        if end is not None and end > self._clock() and (due is None or end < due):
            self._due[id(node)] = end
            heapq.heappush(self._ends, (end, next(self._numbers), node))

    def pop(self) -> Node[Item] | None:
        """The leaf whose last page goes next; it must be offered again afterwards. `None` if there is none."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            end, _, node = heapq.heappop(self._ends)
            if self._due.get(id(node)) == end:
                del self._due[id(node)]
                self.offer(node)
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            self.draws += 1
            if self._keys.get(id(node)) != key:
                continue
            del self._keys[id(node)]
            place = self.place(node)
            if place is not None and self.key(node, place) == key:
                return node
            self.offer(node)
        return None

    def tidy(self) -> None:
        """Let go of nodes that left the tree and of entries that do not count, once they are many."""
        if len(self._heap) + len(self._ends) > 2 * self._last_size + SLACK:
            known = {id(node): node for _, _, node in (*self._heap, *self._ends)}
            self.clear()
            for node in known.values():
                self.offer(node)
            self._last_size = len(self._heap) + len(self._ends)

    def missing(self, nodes: Iterable[Node[Item]]) -> list[Node[Item]]:
        """Those of `nodes` that are leaves of the tier and not in the heap, or would come up too late."""
        now = self._clock()
        entered = {(id(node), key) for key, _, node in self._heap}
        due = {(id(node), end) for end, _, node in self._ends if end <= now}
        found = []
        for node in nodes:
            place, key = self.place(node), self._keys.get(id(node))
            if place is None or (id(node), self._due.get(id(node))) in due:
                continue
            if key is None or key > self.key(node, place) or (id(node), key) not in entered:
                found.append(node)
        return found
