"""A node of the radix tree: a run of whole pages of text, what each page holds, and how much each is worth.

Source: SGLang, `mem_cache/radix_cache.py` (`TreeNode`); priorities and durations as in TensorRT-LLM's
`KvCacheRetentionConfig`, but for every page, so that a system prompt can outrank the turns behind it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
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
        last_use: a number that grows with every use of any node.
        last_time: the clock at the last use or unlock.
        steps: turns of others until this text is expected to go on; `None` where nothing is known.
        alive: whether the tree still has the node.
        namespace: of a root.
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
        self.namespace: Hashable = None
        self.alive = True
        self.children: dict[int, list[Node[Item]]] = {}

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

    def remove(self, child: Node[Item]) -> None:
        """Take a child away."""
        key = page_key(child.pages[0])
        self.children[key].remove(child)
        if not self.children[key]:
            del self.children[key]

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
        duration = self.durations[page]
        if duration is not None and not self.locks and now - self.last_time > duration:
            return DEFAULT_PRIORITY
        return self.priorities[page]

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
