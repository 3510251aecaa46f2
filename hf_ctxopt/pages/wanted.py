"""Which pages a row should have, which of them it lacks, and which are due to be sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rows import Row

if TYPE_CHECKING:
    from .group import LayerGroup


def wanted_pages(group: LayerGroup, end: int, lower: int) -> tuple[range, range]:
    """Logical pages that hold the sinks, and those that hold the tokens `[lower, end)`."""
    size, sinks = group.page_size, -(-min(group.policy.sinks, end) // group.page_size)
    if lower >= end:
        return range(sinks), range(0)
    return range(min(sinks, lower // size)) if lower else range(0), range(lower // size, -(-end // size))


def missing_pages(group: LayerGroup, row: Row, end: int, lower: int, emptied: bool = False) -> list[range]:
    """The wanted pages that the row does not have yet, or not once it is `emptied` of all but the sinks.

    They all come after those it has.
    """
    held = row.runs[-1].first + row.runs[-1].count if row.runs else 0
    if emptied:
        held = min(held, -(-min(group.policy.sinks, row.length) // group.page_size))
    return [range(max(held, pages.start), pages.stop) for pages in wanted_pages(group, end, lower)]


def unsealed(group: LayerGroup, row: Row) -> list[tuple[int, int]]:
    """(logical page, open page) of full pages that the coming step seals."""
    full = row.length // group.page_size
    if group.codecs is None or row.sealed >= full:
        return []
    return row.open_pages(max(row.sealed, group.codecs.open_first), full)


def begun_page(group: LayerGroup, row: Row, length: int) -> int | None:
    """The page that is begun but not full with `length` tokens, where it is not to stay open."""
    logical = length // group.page_size
    if group.codecs is None or length % group.page_size == 0 or logical < group.codecs.open_first:
        return None
    return row.page_of(logical)


def filled_page(group: LayerGroup, row: Row, end: int) -> int | None:
    """The row's begun page, if it is full and can be sealed once the row has `end` tokens."""
    fills = end - row.length >= group.page_size - row.length % group.page_size
    return begun_page(group, row, row.length) if fills else None


def sealed_directly(group: LayerGroup, row: Row, end: int) -> range:
    """Logical pages that a step to `end` tokens fills by itself and that can be sealed."""
    if group.codecs is None:
        return range(0)
    return range(max(-(-row.length // group.page_size), group.codecs.open_first), end // group.page_size)
