"""Checking a layer group's accounts against its page table, by walking the table and counting again."""

from __future__ import annotations

import logging

from ..errors import IntegrityError
from .group import LayerGroup
from .pool import SEALED
from .rows import Row
from .wanted import wanted_pages

logger = logging.getLogger(__name__)


def violations(group: LayerGroup) -> list[str]:
    """Everything in which counters, table and storages disagree; empty when all is well."""
    open_pages, sealed = group.arena.holders()
    found = group.pool.violations(open_pages) + group.sealed.violations(sealed)
    for index, row in enumerate(group.rows):
        listed = [logical for logical, _ in row.pages()]
        wanted = [page for pages in wanted_pages(group, row.length, row.lower) for page in pages]
        wanted = [page for page in wanted if page not in row.holes]
        if listed != wanted:
            found.append(f"row {index} lists logical pages {listed} for tokens [{row.lower}, {row.length})")
        found += [f"row {index}: page {logical} must not be {kind}" for logical, kind in _wrong_kinds(group, row)]
        if row.length != max(0, group.seen - row.pad):
            found.append(f"row {index} has {row.length} tokens, {max(0, group.seen - row.pad)} were seen")
    sizes = {layer: (storage.capacity, storage.sealed_capacity) for layer, storage in group.storages.items()}
    small = [
        layer for layer, size in sizes.items() if size[0] < group.pool.capacity or size[1] < group.sealed.capacity
    ]
    if small:
        found.append(f"storages of layers {small} are smaller than the pool")
    return found


def _wrong_kinds(group: LayerGroup, row: Row) -> list[tuple[int, str]]:
    """Pages that are sealed and must be open, or the other way round; full ones may wait for the next step."""
    if group.codecs is None:
        return [(logical, "sealed") for logical, page in row.pages() if page >= SEALED]
    first, full = group.codecs.open_first, row.length // group.page_size
    found = [(logical, "sealed") for logical, page in row.pages() if page >= SEALED and not first <= logical < full]
    return found + [(logical, "open") for logical, _ in row.open_pages(first, row.sealed)]


def check(group: LayerGroup, strict: bool) -> None:
    """Verify the accounts; on a violation raise (`strict`), or log it and rebuild the counts from the table.

    Raises:
        IntegrityError: there is a violation and `strict` is set.
    """
    found = violations(group)
    if found and strict:
        raise IntegrityError("; ".join(found))
    if found:
        logger.error("page accounts were wrong and have been rebuilt: %s", "; ".join(found))
        open_pages, sealed = group.arena.holders()
        group.pool.rebuild(open_pages)
        group.sealed.rebuild(sealed)
