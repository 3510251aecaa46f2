"""Storing the full pages of a group with fewer bits than before, while their text is in use.

One part (K or V) of one layer is re-encoded at a time, so that no more than its new pages is needed on top, and the
old ones are given back before the next one's turn. Pages keep their numbers meanwhile: a layer that is still to come
reads them as before. Where memory runs out in the middle, nothing is lost, and a later call goes on.
"""

from __future__ import annotations

import torch

from .codec import Codec
from .group import LayerGroup
from .plan import Pages
from .pool import SEALED, PagePool
from .sealed import Codecs


@torch.no_grad()
def requantize(group: LayerGroup, codecs: Codecs) -> None:
    """Store the group's sealed pages, and its full open ones behind the first, by `codecs`.

    Called between steps, for a group whose pages nobody else lists. What pages hold is decoded and encoded anew: it
    has the errors of both.

    Raises:
        torch.OutOfMemoryError: some layers are as they shall be and some as they were, all of them readable.
    """
    arena = group.arena
    group.begun = {}
    if not arena.storages:
        arena.expect_page_bytes(Pages(0, 0))
        group.codecs = arena.codecs = codecs
        return
    if group.codecs is None:
        _close_full_pages(group, codecs.open_first)
    arena.uneven = True
    for storage in arena.storages.values():
        arena.storage_version += 1
        storage.recode(codecs)
    arena.uneven = False
    group.codecs = arena.codecs = codecs


def _close_full_pages(group: LayerGroup, open_first: int) -> None:
    """Make full pages of a group that has only open ones sealed pages of 16 bits: nothing is encoded, few are copied.

    Sealed page `SEALED + n` is then what open page `n` was. All that is allocated, the pages that stay open, is
    allocated before anything changes.
    """
    arena, size = group.arena, group.page_size
    codecs = Codecs(Codec(16, over_tokens=True), Codec(16, over_tokens=False), open_first=open_first)
    full = {page for row in group.rows for _, page in row.open_pages(open_first, row.length // size)}
    stay = sorted({page for row in group.rows for _, page in row.pages()} - full)
    capacity, last = max(len(stay), len(group.rows) * (open_first + 1)), max(full, default=-1) + 1
    made = {layer: storage.compacted(stay, capacity) for layer, storage in arena.storages.items()}
    arena.storage_version += 1
    for layer, (keys, values) in made.items():
        arena.storages[layer].close_all(last, keys, values, codecs)
    group.codecs = arena.codecs = codecs
    arena.pool, arena.sealed = PagePool(capacity), PagePool(last, first=SEALED)
    arena.renumber({page: SEALED + page for page in full} | {page: at for at, page in enumerate(stay)})
    opened, sealed = arena.holders()
    arena.pool.rebuild(opened)
    arena.sealed.rebuild(sealed)
    for row in group.rows:
        row.sealed = max(row.sealed, row.length // size)
