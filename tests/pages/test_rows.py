"""Rows of the page table: runs merge and split, and held tokens come out as stretches."""

from __future__ import annotations

import pytest

from hf_ctxopt.pages.rows import Row, Run, Stretch


def row_of(*pairs: tuple[int, int], length: int = 0, lower: int = 0) -> Row:
    """A row that holds `(logical, pool)` pages."""
    row = Row(length=length, lower=lower)
    for logical, page in pairs:
        row.add(logical, page)
    return row


def test_neighbours_in_text_and_pool_are_one_run() -> None:
    assert row_of((0, 5), (1, 6), (2, 7)).runs == [Run(0, 5, 3)]
    assert row_of((0, 5), (1, 7)).runs == [Run(0, 5, 1), Run(1, 7, 1)]  # a gap in the pool
    assert row_of((0, 5), (3, 6)).runs == [Run(0, 5, 1), Run(3, 6, 1)]  # a gap in the text


def test_pages_are_listed_and_found_by_their_logical_number() -> None:
    row = row_of((0, 9), (4, 2), (5, 3))
    assert list(row.pages()) == [(0, 9), (4, 2), (5, 3)]
    assert [row.page_of(logical) for logical in range(7)] == [9, None, None, None, 2, 3, None]


def test_replacing_a_page_splits_and_merges_runs() -> None:
    row = row_of((0, 4), (1, 5), (2, 6))
    assert row.replace(1, 9) == 5
    assert row.runs == [Run(0, 4, 1), Run(1, 9, 1), Run(2, 6, 1)]
    assert row.replace(1, 5) == 9
    assert row.runs == [Run(0, 4, 3)]


@pytest.mark.parametrize(
    ("start", "stop", "gone", "kept"),
    [
        (0, 99, [4, 5, 6, 7, 1], []),
        (0, 1, [4], [(1, 5), (2, 6), (3, 7), (8, 1)]),
        (1, 3, [5, 6], [(0, 4), (3, 7), (8, 1)]),  # the middle: one run becomes two
        (3, 9, [7, 1], [(0, 4), (1, 5), (2, 6)]),
        (4, 8, [], [(0, 4), (1, 5), (2, 6), (3, 7), (8, 1)]),  # a gap: nothing is there
        (2, 2, [], [(0, 4), (1, 5), (2, 6), (3, 7), (8, 1)]),
    ],
)
def test_dropping_returns_exactly_the_pool_pages_that_go(
    start: int, stop: int, gone: list[int], kept: list[tuple[int, int]]
) -> None:
    row = row_of((0, 4), (1, 5), (2, 6), (3, 7), (8, 1))
    assert row.drop(start, stop) == gone
    assert list(row.pages()) == kept


@pytest.mark.parametrize(
    ("length", "lower", "sinks", "held"),
    [(7, 0, 4, 7), (20, 12, 4, 12), (20, 20, 4, 4), (2, 0, 4, 2), (20, 12, 0, 8)],
)
def test_held_counts_sinks_and_what_is_above_the_lower_bound(length: int, lower: int, sinks: int, held: int) -> None:
    assert Row(length=length, lower=lower).held(sinks, 4) == held


def test_stretches_are_cut_at_sinks_lower_bound_length_and_gaps_in_the_pool() -> None:
    row = row_of((0, 10), (2, 11), (3, 12), (4, 3), length=18, lower=9)
    assert row.stretches(4, sinks=3) == [
        Stretch(slot=40, token=0, length=3),  # the sinks, not the rest of their page
        Stretch(slot=45, token=9, length=7),  # pages 11 and 12 as one, from the lower bound on
        Stretch(slot=12, token=16, length=2),  # the tail
    ]


def test_nothing_is_cut_out_before_the_first_eviction() -> None:
    row = row_of((0, 10), (1, 11), length=6)
    assert row.stretches(4, sinks=3) == [Stretch(slot=40, token=0, length=6)]


def test_a_copy_shares_nothing_that_can_change() -> None:
    row = row_of((0, 1), length=4)
    twin = row.copy()
    twin.add(1, 2)
    twin.length, twin.lower = 8, 3
    assert (row.runs, row.length, row.lower) == ([Run(0, 1, 1)], 4, 0)
