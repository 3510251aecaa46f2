"""Shortening a group's rows: what `crop` and the recovery from an interrupted step have in common."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .capacity import resize
from .plan import Pages
from .pool import SEALED
from .rows import END

if TYPE_CHECKING:
    from .group import LayerGroup


def rewind(group: LayerGroup, seen: int) -> None:
    """Forget all columns from `seen` on. A sealed page that is begun again is decoded into an open one."""
    size = group.page_size
    lengths = [max(0, seen - row.pad) for row in group.rows]
    _make_room_to_reopen(group, lengths)
    for row, length in zip(group.rows, lengths, strict=True):
        row.length, row.lower = length, row.lower if length else 0
        row.sealed = min(row.sealed, length // size)
        row.holes = {page: at for page, at in row.holes.items() if page * size < length}
        group.release(row.drop(-(-length // size), END))
        if row.lower:
            group.drop_below(row, row.lower, row.length)
    reopened: dict[int, int] = {}
    for row in group.rows:
        logical = row.length // size
        page = row.page_of(logical) if row.length % size else None
        if page is None or page < SEALED:
            continue
        if page in reopened:
            group.pool.share([reopened[page]])
        else:
            reopened[page] = group.pool.take(1)[0]
            for layer, storage in group.storages.items():
                storage.reopen(page, reopened[page])
                begun = group.begun.get(layer, {}).get(page)
                if begun is not None:  # what was written before it was encoded loses nothing
                    storage.write(*begun, reopened[page] * size)
        group.replace(row, logical, reopened[page])
    group.set_seen(seen)


def _make_room_to_reopen(group: LayerGroup, lengths: list[int]) -> None:
    """Grow the open pages, whatever the budget, where sealed pages become begun ones again."""
    size, gone = group.page_size, Counter[int]()
    begun: set[int] = set()
    for row, length in zip(group.rows, lengths, strict=True):
        page = row.page_of(length // size) if length % size else None
        begun |= {page} if page is not None and page >= SEALED else set()
        gone.update(page for _, page in row.open_pages(-(-length // size), END))
    if begun:
        free = group.pool.free + sum(group.pool.references(page) == count for page, count in gone.items())
        resize(group.arena, Pages(group.pool.capacity + max(0, len(begun) - free), group.sealed.capacity))
