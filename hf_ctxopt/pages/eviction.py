"""Which page of a radix tree goes next: a heap of leaves whose entries are checked when they come up.

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
_LEAST = 256  # entries below which nothing is tidied up


class Queue(Generic[Item]):
    """Leaves of one tier, the next to go first.

    Args:
        clock: seconds, for priorities that end.
        away: whether this is the second tier.
        hopeful: whether `Node.steps` counts.
    """

    def __init__(self, clock: Callable[[], float], away: bool, hopeful: bool) -> None:
        self._clock, self._in_tier, self._hopeful = clock, away, hopeful
        self._heap: list[tuple[Key, int, Node[Item]]] = []
        self._ends: list[tuple[float, int, Node[Item]]] = []  # when the priority of a leaf's last page ends
        self._numbers = itertools.count()
        self._most = _LEAST

    def clear(self) -> None:
        """Forget all."""
        self._heap, self._ends, self._most = [], [], _LEAST

    def place(self, node: Node[Item]) -> int | None:
        """The node's page that would go next; `None` if none can."""
        if not node.alive or node.locks or node.parent is None:
            return None
        if self._in_tier:
            leaf = node.resident < len(node.items) and not node.children
            return len(node.items) - 1 if leaf else None
        leaf = node.resident > 0 and all(child.resident == 0 for child in node.kids())
        return node.resident - 1 if leaf else None

    def key(self, node: Node[Item], place: int) -> Key:
        """The smaller, the sooner it goes."""
        steps = node.steps if self._hopeful else None
        return node.priority(place, self._clock()), -float(steps or 0), node.last_use

    def offer(self, node: Node[Item]) -> None:
        """The node may have become a leaf, or its worth has changed."""
        place = self.place(node)
        if place is None:
            return
        heapq.heappush(self._heap, (self.key(node, place), next(self._numbers), node))
        end = node.expiry(place)
        if end is not None and end >= self._clock():
            heapq.heappush(self._ends, (end, next(self._numbers), node))
        if len(self._heap) + len(self._ends) > self._most:
            self._tidy()

    def _tidy(self) -> None:
        """Leave one entry of each leaf: every use of a text adds one, whether anything is ever evicted or not."""
        nodes = {id(node): node for _, _, node in (*self._heap, *self._ends)}
        self.clear()
        self._most = 4 * len(nodes) + _LEAST
        for node in nodes.values():
            self.offer(node)

    def pop(self) -> Node[Item] | None:
        """The leaf whose last page goes next; it must be offered again afterwards. `None` if there is none."""
        now = self._clock()
        while self._ends and self._ends[0][0] < now:
            self.offer(heapq.heappop(self._ends)[2])
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            place = self.place(node)
            if place is None:
                continue
            current = self.key(node, place)
            if current == key:
                return node
            heapq.heappush(self._heap, (current, next(self._numbers), node))
        return None

    def missing(self, nodes: Iterable[Node[Item]]) -> list[Node[Item]]:
        """Those of `nodes` that are leaves of the tier and not in the heap."""
        queued = {id(node) for _, _, node in self._heap}
        return [node for node in nodes if self.place(node) is not None and id(node) not in queued]
