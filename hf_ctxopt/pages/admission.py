"""Asking for a step's pages: before any layer group of a cache changes, every one of them must have room.

A model with sliding and full layers has several groups, and the first to arrive may have room where a later one has
not. So the first layer of a step asks for all groups at once; a refusal then leaves the whole cache as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import CacheFullError, ConfigError, InterruptedStepError
from .capacity import compact_open, resize, with_slack
from .holes import divide, drops
from .plan import Pages, StepRequest
from .pool import SEALED
from .rows import Row
from .storage import page_bytes
from .wanted import filled_page, missing_pages, sealed_directly, unsealed, wanted_pages

if TYPE_CHECKING:
    from .group import LayerGroup

_REVOCABLE = 64  # a recorded step of at most so many tokens (candidates of a speculation) seals nothing at its writes


def admit(groups: Sequence[LayerGroup], arriving: LayerGroup, keys: Tensor, values: Tensor) -> None:
    """Make room for the coming step in all groups, and leave each its `request`; or refuse and change nothing.

    Does nothing where another group's layer has asked already in this step.

    Args:
        groups: all layer groups of the cache.
        arriving: the group whose layer begins the step.
        keys: that layer's new key states, `(batch, kv_heads, seq, key_dim)`.
        values: its new value states, `(batch, kv_heads, seq, value_dim)`.

    Raises:
        CacheFullError: the budget has no room; nothing has changed.
        ConfigError: the batch is not the one the cache holds, or the head size cannot be packed.
        InterruptedStepError: an earlier step stopped between two layers.
    """
    codecs = arriving.codecs
    if not arriving.storages and codecs is not None:
        codecs.check(keys, values)
    sealed = codecs.page_bytes(keys, values, arriving.page_size) if codecs is not None else 0
    size = Pages(page_bytes(keys, values, arriving.page_size), sealed)
    known = arriving.arena.expect_page_bytes(size)
    if arriving.request is not None and (known or arriving.storages):
        return
    asking = groups
    if arriving.request is not None:  # a first step: other layers were taken for as large as the first one to arrive
        asking = [arriving]
        arriving.pool.resize(0)
        arriving.sealed.resize(0)
    elif any(group.seen != arriving.seen for group in groups):
        raise InterruptedStepError(
            f"the layers {arriving.layers} have seen {arriving.seen} tokens, other layers "
            f"{max(group.seen for group in groups)}: an earlier forward pass stopped between two layers; "
            "call cache.settle() before the next one"
        )
    for group in groups:
        group.arena.collect()
        if not group.storages and not group.arena.page_bytes:
            group.arena.expect_page_bytes(size)
    divide(groups, keys.shape[0])
    requests = [_request(group, keys.shape[0], keys.shape[-2]) for group in asking]
    for group, request in zip(asking, requests, strict=True):
        if request.evicting and group.before_eviction is not None:
            group.before_eviction()
    try:
        needed = {id(group): request.pages for group, request in zip(asking, requests, strict=True)}
        make_room(groups, needed, len(requests[0].rows))
    except BaseException:
        if asking is not groups:  # the others have begun the first step: an empty cache is what there was
            for group in groups:
                group.crop(group.seen)
        raise
    for group, request in zip(asking, requests, strict=True):
        group.request = request


def _request(group: LayerGroup, batch: int, queries: int) -> StepRequest:
    rows = group.rows or _new_rows(group.pads, batch)
    if len(rows) != batch:
        allowed = f"{len(rows)}, as the cache holds (batch_repeat_interleave changes it)"
        raise ConfigError("batch", batch, allowed)
    horizon = group.policy.horizon
    ends = [max(0, group.seen + queries - row.pad) for row in rows]
    lows = [max(row.lower, horizon(row.length)) for row in rows]
    in_place = (
        group.recording or group.keeping or group.evictor is not None or queries == 1 or _fits(group, ends, lows)
    )
    keep = lows if in_place else [max(low, horizon(end)) for low, end in zip(lows, ends, strict=True)]
    gone = [drops(group, row, end - row.length) for row, end in zip(rows, ends, strict=True)]
    evicting = any(end and horizon(end - 1) for end in ends) or any(gone)
    sealing = group.codecs is not None and queries > (_REVOCABLE if group.recording else 1)
    quiet = queries == 1 and not any(gone)
    quiet = quiet and all(_stays(group, row, end, low) for row, end, low in zip(rows, ends, keep, strict=True))
    pages = group.arena.used if quiet else _rehearse(group, rows, ends, keep, sealing, gone)
    return StepRequest(group.seen, queries, rows, ends, keep, in_place, evicting, sealing, pages, gone)


def _stays(group: LayerGroup, row: Row, end: int, lower: int) -> bool:
    """Whether a one-token step changes none of the row's pages."""
    size = group.page_size
    if end == row.length:
        return lower == row.lower
    tail = row.page_of(row.length // size) if row.length % size else None
    own = tail is not None and group.pool.references(tail) == 1
    return own and lower < row.length and lower // size == row.lower // size and not unsealed(group, row)


def _new_rows(pads: Sequence[int] | None, batch: int) -> list[Row]:
    if pads is not None and len(pads) != batch:
        raise ConfigError("attention_mask", f"{len(pads)} rows", f"{batch} rows, as in the batch")
    return [Row(pad) for pad in (pads if pads is not None else [0] * batch)]


def _fits(group: LayerGroup, ends: list[int], lows: list[int]) -> bool:
    bound = group.row_bound
    return bound is None or all(
        sum(map(len, wanted_pages(group, end, low))) <= bound for end, low in zip(ends, lows, strict=True)
    )


def _rehearse(
    group: LayerGroup, rows: list[Row], ends: list[int], keep: list[int], sealing: bool, leaving: list[list[int]]
) -> Pages:
    """Pages in use after the step, with all drops before all takes: what `begin` will do, counted only."""
    pools = {False: group.pool, True: group.sealed}
    taken = {False: 0, True: 0}
    lost: Counter[int] = Counter()
    writers: Counter[int] = Counter()
    full: set[int] = set()
    for row, end, lower, dropped in zip(rows, ends, keep, leaving, strict=True):
        gone = {page for logical in dropped if (page := row.page_of(logical)) is not None}
        if lower > row.lower:
            wanted = wanted_pages(group, row.length, lower)
            gone |= {page for logical, page in row.pages() if not any(logical in pages for pages in wanted)}
        closing = {page for _, page in unsealed(group, row)} - gone
        full |= closing
        lost.update(gone | closing)
        whole = sealed_directly(group, row, end) if sealing else range(0)
        emptied = lower > row.lower and lower >= row.length  # all but the sinks goes, the begun page too
        for missing in missing_pages(group, row, end, lower, emptied):
            direct = len(range(max(missing.start, whole.start), min(missing.stop, whole.stop)))
            taken[True] += direct
            taken[False] += len(missing) - direct
        tail = row.page_of(row.length // group.page_size) if end > row.length else None
        if tail is None or tail in gone:
            continue
        if sealing and filled_page(group, row, end) is not None:
            taken[True] += 1
            lost[tail] += 1
        else:
            writers[tail] += 1
    taken[True] += len(full)
    for page, count in lost.items():
        sealed = page >= SEALED
        taken[sealed] -= pools[sealed].references(page) == count
    for page, count in writers.items():
        # Copy-on-write: every writer takes a copy, but for the last one if nobody else holds the page.
        taken[False] += count - (group.pool.references(page) - lost[page] <= count)
    return Pages(group.pool.used + taken[False], group.sealed.used + taken[True])


def make_room(groups: Sequence[LayerGroup], needed: dict[int, Pages], rows: int) -> None:
    """Grow the groups that need it. All limits are checked before the first allocation.

    Args:
        groups: all layer groups of the cache.
        needed: pages in use after what is to come, by `id` of the group.
        rows: rows of the batch.

    Raises:
        CacheFullError: the budget has no room, and nobody who shares the pages has any to give up.
    """
    while True:
        try:
            sizes, growing, smaller = _sizes(groups, needed)
            break
        except CacheFullError as full:
            before = {id(group): group.arena.used for group in groups}
            reclaim, size = groups[0].arena.reclaim, groups[0].page_size
            if reclaim is None or not reclaim(-(-(full.needed - full.room) // size)):
                raise
            for group in groups:
                freed = Pages(*(a - b for a, b in zip(before[id(group)], group.arena.used, strict=True)))
                if id(group) in needed:
                    have = needed[id(group)]
                    needed = needed | {id(group): Pages(have.open - freed.open, have.sealed - freed.sealed)}
    for group in smaller:
        if group.pool.capacity > sizes[id(group)].open:
            compact_open(group.arena, sizes[id(group)].open)
    for group in growing:
        sizes[id(group)] = with_slack(group, rows, sizes[id(group)], partial(_most, group, groups, sizes))
    for group in growing:
        resize(group.arena, sizes[id(group)])


def _sizes(
    groups: Sequence[LayerGroup], needed: dict[int, Pages]
) -> tuple[dict[int, Pages], list[LayerGroup], list[LayerGroup]]:
    """Pages each group must have; the groups that grow for it, and those of them that give open pages back for it."""
    sizes = {id(group): group.arena.capacity for group in groups}
    growing, smaller = [], []
    for group in groups:
        have, need = sizes[id(group)], needed.get(id(group), Pages(0, 0))
        if need.open > have.open or need.sealed > have.sealed:
            growing.append(group)
            sizes[id(group)] = Pages(max(have.open, need.open), max(have.sealed, need.sealed))
    for group in growing:
        if _over(group, groups, sizes) and group.codecs is not None:
            # Open pages that an earlier step needed can go to make room for sealed ones.
            least = max(group.pool.used, needed[id(group)].open)
            sizes[id(group)] = sizes[id(group)]._replace(open=least)
            smaller.append(group)
        if _over(group, groups, sizes):
            size, room = group.page_size, _room(group, groups, sizes) or 0
            full = sum(sizes[id(group)]) * size
            raise CacheFullError(
                full, room * size, "raise `budget`, or keep fewer tokens (`ctx_sink` and its `window`)"
            )
    return sizes, growing, smaller


def _most(
    group: LayerGroup, groups: Sequence[LayerGroup], sizes: dict[int, Pages], own: Pages, kind: int
) -> int | None:
    """Pages of a kind (0: open, 1: sealed) a group may have beside the other kind's in `own` and the other groups."""
    others = sum(other.arena.bytes_of(sizes[id(other)]) for other in groups if other is not group)
    rest = own._replace(open=0) if kind == 0 else own._replace(sealed=0)
    each = group.arena.page_bytes if kind == 0 else group.arena.sealed_bytes
    return group.budget.most_pages(group.page_size, each, others + group.arena.bytes_of(rest), sum(rest))


def _room(group: LayerGroup, groups: Sequence[LayerGroup], sizes: dict[int, Pages]) -> int | None:
    """Pages of both kinds, open ones first, that the group may have beside the others; `None` if there is no limit."""
    own = sizes[id(group)]
    room = _most(group, groups, sizes, Pages(0, 0), 0)
    if room is None or room <= own.open:
        return room
    return own.open + (_most(group, groups, sizes, Pages(own.open, 0), 1) or 0)


def _over(group: LayerGroup, groups: Sequence[LayerGroup], sizes: dict[int, Pages]) -> bool:
    room = _room(group, groups, sizes)
    return room is not None and sum(sizes[id(group)]) > room
