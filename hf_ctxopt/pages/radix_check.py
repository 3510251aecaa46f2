"""What is wrong with a radix tree: a walk that counts everything anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .radix import RadixTree


def violations(tree: RadixTree[Any]) -> list[str]:
    """Everything in which counters and nodes disagree; empty when all is well."""
    found: list[str] = []
    pages = resident = locked = 0
    for node in tree.walk():
        name = f"the node at {node.start}"
        parent = node.parent
        count = len(node.items)
        if not count or not count == len(node.pages) == len(node.priorities) == len(node.durations):
            found.append(f"{name} has {count} items for {len(node.pages)} pages")
            continue
        if parent is None or node.start != parent.end or not node.alive:
            found.append(f"{name} does not hang on its parent")
        elif parent.parent is not None and node.resident and parent.resident < len(parent.items):
            found.append(f"{name} is resident behind a page that is not")
        if any(len(page) != tree.page_size for page in node.pages):
            found.append(f"{name} has a page that is not whole")
        if parent is not None and parent.child(node.pages[0]) is not node:
            found.append(f"{name} cannot be found by its first page")
        if node.locks != node.handles + sum(child.locks for child in node.kids()) or node.handles < 0:
            found.append(f"{name} has {node.locks} locks, {node.handles} of its own, and others behind it")
        if not node.sorted_right():
            found.append(f"{name} has not sorted its children")
        if parent is not None and node.namespace != parent.namespace:
            found.append(f"{name} is in another namespace than its parent")
        if not 0 <= node.resident <= count:
            found.append(f"{name} has {node.resident} resident pages of {count}")
        pages += count
        resident += node.resident
        locked += count if node.locks else 0
    for space, root in tree.roots():
        if not root.children or root.namespace != space or not root.sorted_right():
            found.append(f"namespace {space!r} has no text, or its root is wrong")
    counted = (tree.pages, tree.resident_pages, tree.locked_pages)
    if counted != (pages, resident, locked):
        found.append(f"(pages, resident, locked) are counted {counted} and are {(pages, resident, locked)}")
    return found + tree.missing_leaves()
