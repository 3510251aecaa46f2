"""How much storage a layer group allocates: growing to what a step needs, giving back what only one step needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import out_of_memory
from .plan import Pages
from .pool import SEALED, PagePool

if TYPE_CHECKING:
    from .arena import Arena
    from .group import LayerGroup
    from .storage import LayerStorage

logger = logging.getLogger(__name__)

_FINE_FROM = 3840
"""Tokens from which sealed pages grow by less than a 40th: an eighth would eat up what fewer bits save.

With pages of 32 tokens and heads of 64 channels, two open pages in a 16-bit dtype and this slack together stay under a
quarter of a bit per value, which is what the scales leave of the next whole number of bits.
"""

Made = TypeVar("Made")
Limit = Callable[[Pages, int], int | None]


def with_slack(group: LayerGroup, rows: int, required: Pages, limit: Limit) -> Pages:
    """Pages to allocate where `required` are needed: some more, unless a bound is known.

    Args:
        group: the group that grows.
        rows: its rows.
        required: pages needed.
        limit: most pages of a kind (0: open, 1: sealed) beside the given ones of the other kind, at least those
            needed; `None` for no limit.
    """
    required = _with_announced(group, rows, required, limit)
    if group.codecs is None:
        capacity = required.open + required.open // 8 + 1
        bound = _expected_pages(group, rows)
        if bound is not None and bound >= required.open:
            # Near the bound, take the bound itself: a full window then holds the same bytes however it was filled.
            near = required.open <= bound <= required.open + required.open // 2
            capacity = max(required.open, min(bound if near else capacity, bound))
        return Pages(_within(capacity, limit(required, 0)), 0)
    # Open pages first: there are few of them, and every row will want its own.
    opened = _within(max(required.open, rows * open_bound(group)), limit(required, 0))
    required = Pages(opened, required.sealed)
    return Pages(opened, _within(_sealed_with_slack(group, rows, required.sealed), limit(required, 1)))


def _with_announced(group: LayerGroup, rows: int, required: Pages, limit: Limit) -> Pages:
    """`required`, or what a prompt that comes in chunks is known to need: nothing is moved between its chunks."""
    pages = -(-group.announced // group.page_size)
    pages = rows * (pages if group.row_bound is None else min(pages, group.row_bound))
    if group.codecs is None:
        return required._replace(open=max(required.open, _within(pages, limit(required, 0))))
    pages -= rows * open_bound(group)
    return required._replace(sealed=max(required.sealed, _within(pages, limit(required, 1))))


def _sealed_with_slack(group: LayerGroup, rows: int, required: int) -> int:
    if required <= group.sealed.capacity:
        return group.sealed.capacity
    coarse = max(0, min(required // 8 + 1, rows * _FINE_FROM // group.page_size - required))
    slack = max(required // 40 - 3, 1, coarse, group.headroom)
    bound = _expected_pages(group, rows)
    windowed = group.row_bound is not None and bound == group.row_bound * rows
    bound = None if bound is None else bound - rows * (group.codecs.open_first if group.codecs is not None else 0)
    if bound is None or bound < required:  # the text has outgrown what was expected of it
        return required + slack
    near = required <= bound <= required + (required // 2 if windowed else slack)
    return max(required, bound if near else min(required + slack, bound))


def _within(capacity: int, most: int | None) -> int:
    return capacity if most is None else min(capacity, most)


def resize(arena: Arena, capacity: Pages) -> None:
    """Grow to `capacity` pages. The pools grow last: if an allocation fails, some storages are merely larger."""
    arena.storage_version += 1
    for storage in arena.storages.values():
        storage.resize(max(capacity.open, storage.capacity), max(capacity.sealed, storage.sealed_capacity))
    arena.pool.resize(max(capacity.open, arena.pool.capacity))
    if capacity.sealed > arena.sealed.capacity:
        arena.sealed.resize(capacity.sealed)


def open_bound(group: LayerGroup) -> int:
    """Open pages a row of a group with codecs needs between two one-token steps: its first ones and the tail."""
    return (group.codecs.open_first if group.codecs is not None else 0) + 1


def _expected_pages(group: LayerGroup, rows: int) -> int | None:
    bounds = [group.row_bound, None if group.expected is None else -(-group.expected // group.page_size)]
    known = [bound for bound in bounds if bound is not None]
    return min(known) * rows if known else None


def trim(group: LayerGroup, needed: Pages | None = None) -> None:
    """Give back storage that only a recorded (speculative) step, an odd chunk or a larger batch needed.

    Args:
        group: the group.
        needed: pages that the step which begins was promised, if one does.
    """
    if group.recording or group.arena.shared:
        return
    rows, bound = len(group.rows), group.row_bound
    if group.codecs is not None:
        opened = max(rows * open_bound(group), needed.open if needed is not None else 0)
        if group.pool.used <= opened < group.pool.capacity:
            compact_open(group.arena, opened)
        sealed = group.sealed.capacity if bound is None else rows * (bound - group.codecs.open_first)
        sealed = max(sealed, needed.sealed if needed is not None else 0)
        if group.sealed.used <= sealed < group.sealed.capacity:
            _compact_sealed(group.arena, sealed)
    elif bound is not None:
        opened = max(rows * bound, needed.open if needed is not None else 0)
        if group.pool.used <= opened < group.pool.capacity:
            compact_open(group.arena, opened)


def compact_open(arena: Arena, capacity: int) -> None:
    """Move the open pages together and give back all but `capacity`, if there is memory to do so."""
    order = _listed(arena, sealed=False)
    smaller = _made(arena, lambda storage: storage.compacted(order, capacity), len(order))
    if smaller is None:
        return
    for layer, (keys, values) in smaller.items():
        arena.storages[layer].keys, arena.storages[layer].values = keys, values
    arena.pool = PagePool(capacity)
    arena.renumber({page: i for i, page in enumerate(order)})
    arena.pool.rebuild(arena.holders()[0])


def _compact_sealed(arena: Arena, capacity: int) -> None:
    order = _listed(arena, sealed=True)
    smaller = _made(arena, lambda storage: storage.compacted_sealed(order, capacity), len(order))
    if smaller is None:
        return
    for layer, parts in smaller.items():
        for part, (codes, scales) in zip(arena.storages[layer].parts, parts, strict=True):
            part.codes, part.scales = codes, scales
    arena.sealed = PagePool(capacity, first=SEALED)
    arena.renumber({page: SEALED + i for i, page in enumerate(order)})
    arena.sealed.rebuild(arena.holders()[1])


def _listed(arena: Arena, sealed: bool) -> list[int]:
    """The open, or the sealed, pages that somebody lists, in their order."""
    return sorted({page for listing in arena.listings for page in listing.listed() if (page >= SEALED) == sealed})


def _made(arena: Arena, make: Callable[[LayerStorage], Made], pages: int) -> dict[int, Made] | None:
    """What `make` gives of each layer's storage, which is elsewhere then; `None` where there is no memory for it."""
    try:
        made = {layer: make(storage) for layer, storage in arena.storages.items()}
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        logger.warning("no memory to move %d pages together; a larger storage stays: %s", pages, error)
        return None
    arena.storage_version += 1
    return made
