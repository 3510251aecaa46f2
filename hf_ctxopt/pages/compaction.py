"""Giving back the free pages of an arena that several tables list.

Pages are moved in place, from the end into free places before it, and only then is the storage cut off, one layer
after the other: that needs no more room than one layer's smaller storage, so it works where memory is short.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import out_of_memory
from .pool import KINDS, SEALED, PagePool

if TYPE_CHECKING:
    from .arena import Arena

logger = logging.getLogger(__name__)


def compact(arena: Arena) -> int:
    """Move all pages together and give back the rest; returns the bytes that came back.

    Called between steps of every cache whose rows list the arena's pages: all listings are told of the new places.
    Where memory does not suffice for a layer, that layer's storage stays as large as it is.
    """
    before = arena.nbytes
    held = {page for listing in arena.listings for page in listing.listed()}
    places = {page: place for first in (0, SEALED) for page, place in _moves(held, first)}
    opened, sealed = sum(page < SEALED for page in held), sum(page >= SEALED for page in held)
    if all(storage.shape == (opened, sealed) for storage in arena.storages.values()):
        return 0
    arena.storage_version += 1
    for storage in arena.storages.values():
        storage.copy_pages([pair for pair in places.items() if pair[0] < SEALED])
        for source, target in places.items():
            for part in storage.kept(KINDS[1]) if source >= SEALED else []:
                part[:, target - SEALED] = part[:, source - SEALED]
    arena.renumber(places)
    arena.pool, arena.sealed = PagePool(opened), PagePool(sealed, first=SEALED)
    for pool, counts in zip((arena.pool, arena.sealed), arena.holders(), strict=True):
        pool.rebuild(counts)
    for storage in arena.storages.values():
        try:
            storage.resize(opened, sealed)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            logger.warning("no memory to cut a layer's free pages off; its storage stays: %s", error)
    return before - arena.nbytes


def _moves(held: set[int], first: int) -> list[tuple[int, int]]:
    """(page, its new place) of the pages of one kind that lie behind the place where they could end."""
    mine = {page for page in held if (page >= SEALED) == (first == SEALED)}
    end = first + len(mine)
    return list(zip(sorted(page for page in mine if page >= end),
                    (place for place in range(first, end) if place not in mine), strict=True))  # fmt: skip
