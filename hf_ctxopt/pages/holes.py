"""Rows of which any whole page may be missing, as an evictor decides (see `policies/priority_budget.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .plan import Pages
from .rows import Row

if TYPE_CHECKING:
    from .group import LayerGroup


def leaving(group: LayerGroup, row: Row, coming: int) -> int:
    """Pages that the row loses before a step of `coming` tokens. That step itself can still be taken back."""
    if group.evictor is None:
        return 0
    excess = group.evictor.excess(row.held(group.policy.sinks, group.page_size), coming)
    return min(excess, len(_candidates(group, row)))


def drops(group: LayerGroup, row: Row, coming: int) -> list[int]:
    """The logical pages among them."""
    count = leaving(group, row, coming)
    if not count or group.evictor is None:
        return []
    candidates = _candidates(group, row)
    facts = [(page * group.page_size, *row.marks.get(page, (False, 0.0))) for page in candidates]
    return [candidates[at] for at in group.evictor.victims(facts, count)]


def _candidates(group: LayerGroup, row: Row) -> list[int]:
    """Full pages but for the newest one: what is being written, or was just now, stays."""
    last = (row.length - 1) // group.page_size
    return [logical for logical, _ in row.pages() if logical < last]


def drop(group: LayerGroup, row: Row, pages: Sequence[int]) -> None:
    """Drop these pages of the row."""
    for logical in pages:
        group.release(row.drop(logical, logical + 1))
        row.holes[logical] = row.length


def gaps(row: Row, page_size: int) -> tuple[tuple[int, int], ...]:
    """Missing tokens `[start, stop)` in text order, neighbours joined."""
    found: list[tuple[int, int]] = []
    for logical in sorted(row.holes):
        start = logical * page_size
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + page_size)
        else:
            found.append((start, start + page_size))
    return tuple(found)


def divide(groups: Sequence[LayerGroup], rows: int) -> None:
    """Turn a budget in bytes into tokens of a row, once the sizes of pages are known.

    Raises:
        ConfigError: it is not enough for two pages of each row beside the layers that slide.
    """
    for group in groups:
        evictor = group.evictor
        if evictor is None or evictor.nbytes is None:
            continue
        others = sum(
            other.arena.bytes_of(Pages((other.row_bound or 0) * rows, 0)) for other in groups if other is not group
        )
        rest, open_pages = evictor.nbytes - others, 0
        page = group.arena.page_bytes
        if group.codecs is not None:
            open_pages = group.codecs.open_first + 1
            rest -= rows * open_pages * page
            page = group.arena.sealed_bytes
        pages = rest // (rows * max(1, page)) + open_pages
        if pages < 2:
            allowed = f"at least {others + 2 * rows * group.arena.page_bytes} bytes: two pages of each row"
            raise ConfigError("budget", f"{evictor.nbytes} bytes", allowed)
        evictor.tokens = pages * group.page_size
