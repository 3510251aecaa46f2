"""Asking for a step's pages: before any layer group of a cache changes, every one of them must have room.

A model with sliding and full layers has several groups, and the first to arrive may have room where a later one has
not. So the first layer of a step asks for all groups at once; a refusal then leaves the whole cache as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import CacheFullError, ConfigError, InterruptedStepError
from .capacity import resize, with_slack
from .plan import StepRequest
from .rows import Row
from .storage import page_bytes

if TYPE_CHECKING:
    from .group import LayerGroup


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
        ConfigError: the batch is not the one the cache holds.
        InterruptedStepError: an earlier step stopped between two layers.
    """
    size = page_bytes(keys, values, arriving.page_size)
    known = arriving.expect_page_bytes(size)
    if arriving.request is not None and (known or arriving.storages):
        return
    asking = groups
    if arriving.request is not None:  # a first step: other layers were taken for as large as the first one to arrive
        asking = [arriving]
        arriving.pool.resize(0)
    elif any(group.seen != arriving.seen for group in groups):
        raise InterruptedStepError(
            f"the layers {arriving.layers} have seen {arriving.seen} tokens, other layers "
            f"{max(group.seen for group in groups)}: an earlier forward pass stopped between two layers; "
            "call cache.settle() before the next one"
        )
    for group in groups:
        if not group.storages and not group.page_bytes:
            group.expect_page_bytes(size)
    requests = [_request(group, keys.shape[0], keys.shape[-2]) for group in asking]
    for group, request in zip(asking, requests, strict=True):
        if request.evicting and group.before_eviction is not None:
            group.before_eviction()
    try:
        _make_room(groups, dict(zip(map(id, asking), requests, strict=True)))
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
    in_place = group.recording or queries == 1 or _fits(group, ends, lows)
    keep = lows if in_place else [max(low, horizon(end)) for low, end in zip(lows, ends, strict=True)]
    evicting = any(end and horizon(end - 1) for end in ends)
    pages = group.pool.used + _new_pages(group, rows, ends, keep)
    return StepRequest(group.seen, queries, rows, ends, keep, in_place, evicting, pages)


def _new_rows(pads: Sequence[int] | None, batch: int) -> list[Row]:
    if pads is not None and len(pads) != batch:
        raise ConfigError("attention_mask", f"{len(pads)} rows", f"{batch} rows, as in the batch")
    return [Row(pad) for pad in (pads if pads is not None else [0] * batch)]


def _fits(group: LayerGroup, ends: list[int], lows: list[int]) -> bool:
    bound = group.row_bound
    return bound is None or all(
        sum(map(len, group.wanted_pages(end, low))) <= bound for end, low in zip(ends, lows, strict=True)
    )


def _new_pages(group: LayerGroup, rows: list[Row], ends: list[int], keep: list[int]) -> int:
    """Pages the step takes more than it gives back: a rehearsal, with all drops before all takes."""
    pool, needed = group.pool, 0
    lost: Counter[int] = Counter()
    writers: Counter[int] = Counter()
    for row, end, lower in zip(rows, ends, keep, strict=True):
        needed += sum(map(len, group.missing_pages(row, end, lower)))
        gone: set[int] = set()
        if lower > row.lower:
            wanted = group.wanted_pages(end, lower)
            gone = {page for logical, page in row.pages() if not any(logical in pages for pages in wanted)}
        lost.update(gone)
        tail = row.page_of(row.length // group.page_size) if end > row.length else None
        if tail is not None and tail not in gone:
            writers[tail] += 1
    needed -= sum(pool.references(page) == count for page, count in lost.items())
    for page, count in writers.items():
        # Copy-on-write: every writer takes a copy, but for the last one if nobody else holds the page.
        needed += count - (pool.references(page) - lost[page] <= count)
    return needed


def _make_room(groups: Sequence[LayerGroup], requests: dict[int, StepRequest]) -> None:
    """Grow the groups that need it. All limits are checked before the first allocation."""
    sizes = {id(group): group.pool.capacity for group in groups}
    growing = [group for group in groups if id(group) in requests and requests[id(group)].pages > sizes[id(group)]]
    sizes.update({id(group): requests[id(group)].pages for group in growing})
    for group in growing:
        needed, limit = sizes[id(group)], _limit(group, groups, sizes)
        if limit is not None and needed > limit:
            size = group.page_size
            raise CacheFullError(needed * size, limit * size, "raise `budget`, or use a smaller `window`")
    for group in growing:
        sizes[id(group)] = with_slack(
            group, len(requests[id(group)].rows), sizes[id(group)], _limit(group, groups, sizes)
        )
    for group in growing:
        resize(group, sizes[id(group)])


def _limit(group: LayerGroup, groups: Sequence[LayerGroup], sizes: dict[int, int]) -> int | None:
    """Pages the group may have beside the others; `None` if there is no limit."""
    others = sum(sizes[id(other)] * other.page_bytes for other in groups if other is not group)
    return group.budget.most_pages(group.page_size, group.page_bytes, others)
