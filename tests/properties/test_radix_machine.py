"""A hypothesis machine over the radix tree: priorities, time, locks, splits, two tiers; everything recounted."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hf_ctxopt.pages.radix import RadixTree

TOKENS = st.lists(st.integers(1, 2), min_size=1, max_size=9)
SPACES = st.sampled_from("ab")


class RadixMachine(RuleBasedStateMachine):
    """The tree beside a dictionary: (namespace, prefix) → [priority, duration]."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.tree: RadixTree[list[Any]] = RadixTree(2, lambda: self.now)
        self.known: dict[tuple[Any, ...], list[Any]] = {}
        self.locks: list[tuple[Any, tuple[Any, ...]]] = []

    def _pages(self, space: str, text: list[int]) -> list[tuple[Any, ...]]:
        return [(space, *text[: 2 * page + 2]) for page in range(len(text) // 2)]

    @rule(space=SPACES, text=TOKENS, worth=st.sampled_from([None, 0, 35, 90]), span=st.sampled_from([None, 3.0]))
    def insert(self, space: str, text: list[int], worth: int | None, span: float | None) -> None:
        pages = self._pages(space, text)
        items = [[page, False] for page in pages]
        got = self.tree.insert(space, text, items, [worth] * len(pages), [span] * len(pages), merge=self._merge)
        assert got.existing == sum(page in self.known for page in pages)
        for page, item in zip(pages, items, strict=True):
            self.known.setdefault(page, item)

    def _merge(self, old: list[Any], new: list[Any]) -> list[Any]:
        old[1] = False
        return old

    @rule(space=SPACES, text=TOKENS, lock=st.booleans())
    def match(self, space: str, text: list[int], lock: bool) -> None:
        pages = self._pages(space, text)
        held = next((at for at, page in enumerate(pages) if page not in self.known), len(pages))
        found = self.tree.match(space, text)
        assert [item[0] for item in found.items] == pages[:held]
        rest = text[2 * held :]
        alike = [key[2 * held + 1 :] for key in self.known if key[: 2 * held + 1] == (space, *text[: 2 * held])]
        partial = 1 if rest and any(key[:1] == tuple(rest[:1]) for key in alike) else 0
        assert (found.partial[1] if found.partial else 0) == partial
        if lock and held:
            self.tree.lock(found.node)
            self.locks.append((found.node, pages[held - 1]))

    @rule(which=st.integers(0, 99))
    def unlock(self, which: int) -> None:
        if self.locks:
            self.tree.unlock(self.locks.pop(which % len(self.locks))[0])

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def _locked(self, page: tuple[Any, ...]) -> bool:
        return any(end[: len(page)] == page for _, end in self.locks)

    @rule(count=st.integers(1, 4), away=st.booleans())
    def evict(self, count: int, away: bool) -> None:
        for _ in range(count):
            worth = {tuple(node.items[at][0]): node.priority(at, self.now)
                     for node in self.tree.walk() for at in range(len(node.items))}  # fmt: skip
            leaves = [page for page, item in self.known.items() if not item[1] and not self._locked(page)
                      and not any(len(other) > len(page) and other[: len(page)] == page and not more[1]
                                  for other, more in self.known.items())]  # fmt: skip
            moved: list[list[Any]] = []
            gone = self.tree.evict(1, (lambda item, _, moved=moved: self._send(item, moved)) if away else None)
            if not leaves:
                assert not gone
                assert not moved
                return
            chosen = moved[0] if away else next(item for item in gone if not item[1])
            assert chosen[0] in leaves
            assert worth[chosen[0]] == min(worth[page] for page in leaves)
            for item in gone:
                del self.known[item[0]]

    def _send(self, item: list[Any], moved: list[list[Any]]) -> list[Any]:
        moved.append(item)
        item[1] = True
        return item

    @rule()
    def evict_away(self) -> None:
        for item in self.tree.evict_away(1):
            assert item[1]
            assert not self._locked(item[0])
            del self.known[item[0]]

    @invariant()
    def accounts(self) -> None:
        self.tree.check_integrity()
        assert self.tree.pages == len(self.known)
        assert self.tree.resident_pages == sum(not item[1] for item in self.known.values())
        assert self.tree.locked_pages == sum(self._locked(page) for page in self.known)


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
