"""The pool's counts, one rule at a time (random programs: `tests/properties/test_pages_machine.py`)."""

from __future__ import annotations

import pytest

from hf_ctxopt.errors import IntegrityError
from hf_ctxopt.pages.pool import PagePool


def pool_with(counts: list[int]) -> PagePool:
    """A pool whose page `i` has `counts[i]` holders."""
    pool = PagePool(len(counts))
    pool.rebuild(dict(enumerate(counts)))
    return pool


def test_taken_pages_have_one_holder_and_come_back() -> None:
    pool = PagePool(4)
    assert (pool.capacity, pool.free, pool.used, pool.shared) == (4, 4, 0, 0)
    assert pool.take(3) == [0, 1, 2]
    assert (pool.free, pool.used) == (1, 3)
    assert [pool.references(page) for page in range(4)] == [1, 1, 1, 0]
    pool.release([1])
    assert (pool.free, pool.used) == (2, 2)
    pool.release([0, 2])
    assert (pool.free, pool.used) == (4, 0)


def test_shared_page_is_free_only_after_its_last_holder() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.share([page, page])
    assert (pool.references(page), pool.shared, pool.used) == (3, 1, 1)
    pool.release([page, page])
    assert (pool.references(page), pool.shared, pool.free) == (1, 0, 1)
    pool.release([page])
    assert pool.free == 2


def test_double_free_is_an_error_and_counts_stay_right() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(IntegrityError, match="page 0 is released twice"):
        pool.release(pages)
    assert (pool.free, pool.violations({})) == (2, [])


def test_free_page_cannot_be_shared() -> None:
    pool = PagePool(2)
    with pytest.raises(IntegrityError, match="page 1 is free"):
        pool.share([1])
    assert pool.violations({}) == []


def test_more_than_is_free_cannot_be_taken_and_nothing_is() -> None:
    pool = PagePool(3)
    pool.take(2)
    with pytest.raises(IntegrityError, match="2 pages asked of a pool with 1 free"):
        pool.take(2)
    assert pool.free == 1


@pytest.mark.parametrize(
    ("counts", "count", "after", "expected"),
    [
        ([1, 0, 0, 0], 2, 0, [1, 2]),  # right behind the row's last page
        ([0, 0, 1, 0], 1, 2, [3]),  # ... though an earlier page is free too
        ([1, 0, 1, 0, 0], 3, 0, [1, 3, 4]),  # follows on, then the next stretch
        ([1, 1, 0, 0, 0, 0], 1, 0, [4]),  # the page behind is taken: leave page 1's row room to grow
        ([0, 1, 0, 0, 0], 3, None, [2, 3, 4]),  # all in one stretch where one is long enough
        ([0, 1, 0, 0, 0, 0], 2, None, [4, 5]),  # ... behind the room that page 1's row may need
        ([0, 0, 0, 1], 3, None, [0, 1, 2]),  # a stretch at the very start belongs to nobody: from its beginning
        ([0, 0, 1], 1, 2, [0]),  # `after` is the last page: nothing follows
        ([1, 1, 0, 1], 1, 0, [2]),  # the only free page
    ],
)
def test_neighbouring_pages_are_preferred(
    counts: list[int], count: int, after: int | None, expected: list[int]
) -> None:
    assert pool_with(counts).take(count, after) == expected


def test_two_rows_that_grow_in_turn_stay_in_one_stretch_each() -> None:
    pool = PagePool(16)
    rows = [pool.take(1), pool.take(1)]
    for _ in range(7):
        for row in rows:
            row += pool.take(1, row[-1])
    gaps = [sum(b != a + 1 for a, b in zip(row, row[1:], strict=False)) for row in rows]
    assert gaps == [0, 0]


def test_growing_adds_free_pages_at_the_end() -> None:
    pool = pool_with([1, 2])
    pool.resize(5)
    assert (pool.capacity, pool.free, pool.used) == (5, 3, 2)
    assert [pool.references(page) for page in range(5)] == [1, 2, 0, 0, 0]


def test_only_free_pages_at_the_end_can_go() -> None:
    pool = pool_with([1, 0, 2, 0, 0])
    with pytest.raises(IntegrityError, match="cannot shrink the pool to 2 pages"):
        pool.resize(2)
    assert (pool.capacity, pool.free) == (5, 3)
    pool.resize(3)
    assert (pool.capacity, pool.free) == (3, 1)


def test_violations_name_every_kind_of_disagreement() -> None:
    pool = pool_with([1, 0, 2])
    assert pool.violations({0: 1, 2: 2}) == []
    assert pool.violations({0: 1, 2: 1}) == ["page 2 has 2 references, 1 holders"]
    assert pool.violations({0: 1, 1: 1, 2: 2}) == ["page 1 has 0 references, 1 holders"]
    assert pool.violations({0: 1, 2: 2, 7: 1}) == ["page 7 is held and does not exist"]
    pool._free = 3
    assert pool.violations({0: 1, 2: 2}) == ["3 pages counted free, 1 are"]


def test_rebuild_takes_the_table_for_the_truth() -> None:
    pool = pool_with([3, 0, 1, 1])
    pool.rebuild({1: 2, 3: 1})
    assert [pool.references(page) for page in range(4)] == [0, 2, 0, 1]
    assert (pool.free, pool.shared) == (2, 1)
