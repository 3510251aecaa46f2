"""How much storage a layer group allocates: growing to what a step needs, giving back what only one step needed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .pool import PagePool

if TYPE_CHECKING:
    from .group import LayerGroup

logger = logging.getLogger(__name__)


def with_slack(group: LayerGroup, rows: int, required: int, limit: int | None) -> int:
    """Pages to allocate where `required` are needed: an eighth more, unless a bound is known.

    Args:
        group: the group that grows.
        rows: its rows.
        required: pages needed.
        limit: most pages it may have, at least `required`; `None` for no limit.
    """
    capacity = required + required // 8 + 1
    bound = _expected_pages(group, rows)
    if bound is not None:
        # Near the bound, take the bound itself: a full window then holds the same bytes however it was filled.
        capacity = bound if required <= bound <= required + required // 2 else capacity
        capacity = max(required, min(capacity, bound))
    return capacity if limit is None else min(capacity, limit)


def resize(group: LayerGroup, capacity: int) -> None:
    """Grow to `capacity` pages. The pool grows last: if an allocation fails, some storages are merely larger."""
    for storage in group.storages.values():
        storage.resize(max(capacity, storage.capacity))
    group.pool.resize(capacity)


def _expected_pages(group: LayerGroup, rows: int) -> int | None:
    bounds = [group.row_bound, None if group.expected is None else -(-group.expected // group.page_size)]
    known = [bound for bound in bounds if bound is not None]
    return min(known) * rows if known else None


def trim(group: LayerGroup) -> None:
    """Give back storage that only a recorded (speculative) step or a larger batch needed."""
    bound = group.row_bound
    most = None if bound is None else bound * len(group.rows)
    if most is None or group.recording or group.pool.capacity <= most or group.pool.used > most:
        return
    order = sorted({page for row in group.rows for _, page in row.pages()})
    try:
        smaller = {layer: storage.compacted(order, most) for layer, storage in group.storages.items()}
    except (MemoryError, torch.OutOfMemoryError) as error:
        logger.warning("no memory to move %d pages together; a larger storage stays: %s", len(order), error)
        return
    for layer, (keys, values) in smaller.items():
        group.storages[layer].keys, group.storages[layer].values = keys, values
    place = {page: i for i, page in enumerate(order)}
    for row in group.rows:
        pairs = list(row.pages())
        row.runs = []
        for logical, page in pairs:
            row.add(logical, place[page])
    group.pool = PagePool(most)
    group.pool.rebuild(group.holders())
