"""A state machine over the pool of pages alone, against a dictionary of counts."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hf_ctxopt.errors import IntegrityError
from hf_ctxopt.pages.pool import PagePool
from tests.properties.test_pages_machine import SETTINGS


class PoolMachine(RuleBasedStateMachine):
    """The pool alone, against a dictionary of counts."""

    @initialize(capacity=st.integers(0, 12))
    def start(self, capacity: int) -> None:
        self.pool = PagePool(capacity)
        self.counts = [0] * capacity

    @rule(count=st.integers(0, 8), after=st.one_of(st.none(), st.integers(0, 11)))
    def take(self, count: int, after: int | None) -> None:
        free = self.counts.count(0)
        if count > free:
            with pytest.raises(IntegrityError):
                self.pool.take(count, after)
            return
        following = None if after is None else after + 1
        is_free = following is not None and following < len(self.counts) and self.counts[following] == 0
        pages = self.pool.take(count, after)
        assert len(pages) == len(set(pages)) == count
        assert all(self.counts[page] == 0 for page in pages)
        if count and is_free:
            assert pages[0] == following
        for page in pages:
            self.counts[page] = 1

    @rule(picks=st.lists(st.integers(0, 30), max_size=4))
    def share(self, picks: list[int]) -> None:
        held = [page for page, count in enumerate(self.counts) if count]
        chosen = [held[pick % len(held)] for pick in picks] if held else []
        self.pool.share(chosen)
        for page in chosen:
            self.counts[page] += 1

    @rule(pick=st.integers(0, 30))
    def release(self, pick: int) -> None:
        if not self.counts:
            return
        page = pick % len(self.counts)
        if self.counts[page] == 0:
            with pytest.raises(IntegrityError):
                self.pool.release([page])
            with pytest.raises(IntegrityError):
                self.pool.share([page])
            return
        self.pool.release([page])
        self.counts[page] -= 1

    @rule(capacity=st.integers(0, 20))
    def resize(self, capacity: int) -> None:
        if any(self.counts[capacity:]):
            with pytest.raises(IntegrityError):
                self.pool.resize(capacity)
            return
        self.pool.resize(capacity)
        self.counts = (self.counts + [0] * capacity)[:capacity]

    @invariant()
    def counts_are_right(self) -> None:
        assert [self.pool.references(page) for page in range(self.pool.capacity)] == self.counts
        assert self.pool.free == self.counts.count(0)
        assert self.pool.used == len(self.counts) - self.counts.count(0)
        assert self.pool.shared == sum(count > 1 for count in self.counts)
        assert self.pool.violations({page: count for page, count in enumerate(self.counts) if count}) == []


PoolMachine.TestCase.settings = SETTINGS
TestPoolMachine = PoolMachine.TestCase
