"""A node of the radix tree: a run of whole pages of text, what each page holds, and how much each is worth.

Source: SGLang, `mem_cache/radix_cache.py` (`TreeNode`); priorities and durations as in TensorRT-LLM's
`KvCacheRetentionConfig`, but for every page, so that a system prompt can outrank the turns behind it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

DEFAULT_PRIORITY = 35

Item = TypeVar("Item")
Page = tuple[int, ...]  # the tokens of one page


def page_key(page: Page) -> int:
    """Where a child is looked for. Only speeds the search up: tokens are always compared."""
    return hash(page)


class Node(Generic[Item]):
    """A run of pages behind `parent`.

    Args:
        parent: `None` for the root of a namespace, which holds no page.
        pages: the tokens of each page.
        items: what each page holds.
        priorities: worth of each page, 0 to 100.
        durations: seconds after its last use for which the priority of each page holds; `None` for ever.

    Attributes:
        start: tokens before the node's first page.
        resident: leading pages whose items are where they are used; those behind them lie elsewhere (second tier).
        locks: users of this node or of one behind it.
        handles: locks taken on this very node.
        namespace: where it belongs; set on a root, and the same behind it.
        last_use: a number that grows with every use of any node.
        last_time: the clock at the last use or unlock.
        steps: turns of others until this text is expected to go on; `None` where nothing is known.
        alive: whether the tree still has the node.
    """

    def __init__(
        self, parent: Node[Item] | None, pages: list[Page], items: list[Item], priorities: list[int],
        durations: list[float | None],
    ) -> None:  # fmt: skip
        self.parent, self.pages, self.items = parent, pages, items
        self.priorities, self.durations = priorities, durations
        self.start: int = 0 if parent is None else parent.end
        self.resident, self.locks, self.last_use, self.last_time = len(items), 0, 0, 0.0
        self.steps: int | None = None
        self.alive, self.handles = True, 0
        self.namespace: Hashable = None if parent is None else parent.namespace
        self.children: dict[int, list[Node[Item]]] = {}
        self._firsts: list[Page] = []  # the children's first pages, sorted, and the children in that order
        self._sorted: list[Node[Item]] = []

    @property
    def end(self) -> int:
        """Tokens up to the end of the node's last page."""
        return self.start + sum(map(len, self.pages))

    def kids(self) -> Iterator[Node[Item]]:
        """The nodes right behind this one."""
        return (child for same in self.children.values() for child in same)

    def child(self, page: Page) -> Node[Item] | None:
        """The child that begins with `page`."""
        return next((child for child in self.children.get(page_key(page), ()) if child.pages[0] == page), None)

    def add(self, child: Node[Item]) -> None:
        """Put a child behind this node."""
        self.children.setdefault(page_key(child.pages[0]), []).append(child)
        place = bisect_left(self._firsts, child.pages[0])
        self._firsts.insert(place, child.pages[0])
        self._sorted.insert(place, child)

    def remove(self, child: Node[Item]) -> None:
        """Take a child away."""
        key = page_key(child.pages[0])
        self.children[key].remove(child)
        if not self.children[key]:
            del self.children[key]
        place = bisect_left(self._firsts, child.pages[0])
        del self._firsts[place], self._sorted[place]

    def nearest(self, tokens: Page) -> tuple[Node[Item], int] | None:
        """The child that begins like `tokens` for longest, and for how many tokens; `None` if none does.

        It is a neighbour of the place where `tokens` would be among the sorted first pages.
        """
        place = bisect_left(self._firsts, tokens)
        near = [
            (same_tokens(self._firsts[at], tokens), self._sorted[at])
            for at in (place - 1, place)
            if 0 <= at < len(self._sorted)
        ]
        same, child = max(near, key=lambda one: one[0], default=(0, None))
        return (child, same) if child is not None and same else None

    def sorted_right(self) -> bool:
        """Whether the sorted children are the children."""
        kids = sorted(self.kids(), key=lambda child: child.pages[0])
        return self._firsts == [child.pages[0] for child in kids] and all(map(_same, self._sorted, kids))

    def split(self, at: int) -> Node[Item]:
        """Cut before page `at`. This object becomes the lower part, so that a lock on it goes on covering all of it.

        Returns:
            The upper part, a new node.
        """
        parent = self.parent
        if parent is None:
            raise ValueError("a root has no pages to cut")
        parent.remove(self)
        upper: Node[Item] = Node(
            parent, self.pages[:at], self.items[:at], self.priorities[:at], self.durations[:at]
        )  # fmt: skip
        upper.resident = min(at, self.resident)
        upper.locks, upper.last_use, upper.last_time, upper.steps = (
            self.locks, self.last_use, self.last_time, self.steps,
        )  # fmt: skip
        parent.add(upper)
        self.pages, self.items = self.pages[at:], self.items[at:]
        self.priorities, self.durations = self.priorities[at:], self.durations[at:]
        self.resident = self.resident - upper.resident
        self.parent, self.start = upper, upper.end
        upper.add(self)
        return upper

    def cut(self) -> Item:
        """Take the last page away."""
        self.pages.pop()
        self.priorities.pop()
        self.durations.pop()
        item = self.items.pop()
        self.resident = min(self.resident, len(self.items))
        return item

    def priority(self, page: int, now: float) -> int:
        """What a page is worth now. A duration runs from the moment at which the node was last used."""
        end = self.expiry(page)
        return self.priorities[page] if end is None or now < end else DEFAULT_PRIORITY

    def expire(self, now: float) -> None:
        """Make final what is over: a later use does not bring a priority back, only a new value does."""
        for page, duration in enumerate(self.durations):
            if duration is not None:
                self.priorities[page] = self.priority(page, now)
                end = self.expiry(page)
                self.durations[page] = duration if end is None or now < end else None

    def expiry(self, page: int) -> float | None:
        """When the page's priority ends, if it does."""
        duration = self.durations[page]
        return None if duration is None or self.locks else self.last_time + duration

    def path(self) -> list[Node[Item]]:
        """The nodes from the first with pages to this one."""
        found: list[Node[Item]] = []
        node: Node[Item] | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def text(self) -> list[int]:
        """All tokens up to the node's end."""
        return [token for node in self.path() for page in node.pages for token in page]


def same_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _same(one: object, other: object) -> bool:
    return one is other
