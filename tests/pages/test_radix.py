"""The radix tree: match, insert, split, lock, evict, priorities that end, and an oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hf_ctxopt.errors import IntegrityError
from hf_ctxopt.pages import radix_node
from hf_ctxopt.pages.radix import RadixTree
from hf_ctxopt.policies import priority as rules


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def tree_of(*texts: list[int], size: int = 2, clock: Clock | None = None) -> RadixTree[str]:
    tree: RadixTree[str] = RadixTree(size, clock or Clock())
    for at, text in enumerate(texts):
        tree.insert("n", text, [f"{at}.{page}" for page in range(len(text) // size)])
    tree.check_integrity()
    return tree


def test_a_match_ends_where_the_texts_part() -> None:
    tree = tree_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8])
    found = tree.match("n", [1, 2, 3, 4, 5, 6, 9])
    assert (found.items, found.tokens, found.partial) == (["0.0", "0.1", "0.2"], 6, None)
    assert tree.match("n", [1, 2, 3, 4, 7, 8]).items == ["0.0", "0.1", "1.2"]
    assert tree.match("n", [1, 2, 3]).items == ["0.0"]
    assert tree.match("n", [2, 1]).items == []
    assert tree.match("m", [1, 2, 3, 4]).items == []
    assert tree.pages == 4


def test_one_token_is_left_where_the_caller_asks_for_it() -> None:
    tree = tree_of([1, 2, 3, 4])
    found = tree.match("n", [1, 2, 3, 4], limit=3)
    assert (found.items, found.partial) == (["0.0"], ("0.1", 1))
    assert tree.match("n", [1, 2, 3, 9, 9]).partial == ("0.1", 1)
    assert tree.match("n", [1, 2, 9, 9]).partial is None
    assert tree.match("n", [1, 9]).partial == ("0.0", 1)


def test_an_insertion_says_what_was_there_and_merges_it() -> None:
    tree = tree_of([1, 2, 3, 4])
    got = tree.insert("n", [1, 2, 3, 4, 5, 6], ["a", "b", "c"], merge=lambda old, new: f"{old}+{new}")
    assert (got.existing, got.node.items) == (2, ["c"])
    assert tree.match("n", [1, 2, 3, 4, 5, 6]).items == ["0.0+a", "0.1+b", "c"]
    tree.check_integrity()


def test_a_lock_survives_a_split_and_is_taken_back_once() -> None:
    tree = tree_of([1, 2, 3, 4, 5, 6])
    lower = tree.match("n", [1, 2, 3, 4, 5, 6]).node
    tree.lock(lower)
    upper = tree.match("n", [1, 2, 9, 9]).node  # splits
    assert upper is not lower
    tree.check_integrity()
    assert tree.locked_pages == tree.pages == 3
    assert tree.evict(5) == []
    tree.lock(upper)
    tree.unlock(lower)
    tree.check_integrity()
    assert tree.locked_pages == 1
    assert tree.evict(5) == ["0.2", "0.1"]
    tree.unlock(upper)
    with pytest.raises(IntegrityError, match="unlocked"):
        tree.unlock(upper)
    assert tree.evict(5) == ["0.0"]
    assert (tree.pages, tree.locked_pages) == (0, 0)
    tree.check_integrity()


def test_without_priorities_the_least_recently_used_goes_first() -> None:
    tree = tree_of([1, 1], [2, 2], [3, 3])
    tree.match("n", [1, 1])
    assert [tree.evict(1)[0] for _ in range(3)] == ["1.0", "2.0", "0.0"]


def test_leaves_go_before_what_they_stand_on_and_only_as_much_as_asked() -> None:
    tree = tree_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8])
    tree.match("n", [1, 2, 3, 4, 5, 6])
    assert tree.evict(2) == ["1.2", "0.2"]
    assert tree.evict(1) == ["0.1"]
    assert tree.match("n", [1, 2, 3, 4]).items == ["0.0"]
    tree.check_integrity()


def test_priorities_rank_before_recency_and_belong_to_pages() -> None:
    tree: RadixTree[str] = RadixTree(1, Clock())
    tree.insert("n", [1, 2], ["system", "chatter"], [90, 10])
    tree.insert("n", [3], ["old"], [None])
    tree.insert("n", [4], ["low"], [5])
    assert tree.evict(2) == ["low", "chatter"]
    assert tree.evict(2) == ["old", "system"]  # soft: the last one goes too


def test_new_values_override_old_ones() -> None:
    tree: RadixTree[str] = RadixTree(1, Clock())
    tree.insert("n", [1], ["a"], [90])
    tree.insert("n", [2], ["b"], [50])
    tree.insert("n", [1], ["x"], [None])
    assert tree.match("n", [1]).node.priorities == [90]
    tree.insert("n", [1], ["x"], [20])
    assert tree.evict(1) == ["a"]


@pytest.mark.parametrize(("now", "first"), [(0, "b"), (2, "b"), (4.9, "b"), (5, "a"), (9, "a")])
def test_a_priority_ends_after_its_duration(now: float, first: str) -> None:
    """The clock starts at the last use; then the priority is the default, which `b` is just above."""
    clock = Clock()
    tree: RadixTree[str] = RadixTree(1, clock)
    tree.insert("n", [1], ["a"], [80], [5.0])
    tree.insert("n", [2], ["b"], [36])
    clock.now = now
    assert tree.evict(1) == [first]


def test_the_clock_of_a_duration_starts_at_the_release() -> None:
    clock = Clock()
    tree: RadixTree[str] = RadixTree(1, clock)
    node = tree.insert("n", [1], ["a"], [80], [5.0]).node
    tree.insert("n", [2], ["b"], [36])
    tree.lock(node)
    clock.now = 100
    tree.unlock(node)
    clock.now = 104
    assert tree.evict(1) == ["b"]
    clock.now = 106
    tree.insert("n", [3], ["c"], [36])
    assert tree.evict(1) == ["a"]


def test_what_goes_on_latest_goes_first_among_equals() -> None:
    tree: RadixTree[str] = RadixTree(1, Clock())
    tree.insert("n", [1], ["late"], steps_to_next=7)
    tree.insert("n", [2], ["soon"], steps_to_next=1)
    tree.insert("n", [3], ["high"], [60], steps_to_next=9)
    assert tree.evict(3) == ["late", "soon", "high"]


def test_second_tier_pages_stay_and_come_back() -> None:
    tree = tree_of([1, 2, 3, 4, 5, 6])
    sent: list[str] = []
    assert tree.evict(2, lambda item, priority: sent.append(item) or f"away {item}") == []
    tree.check_integrity()
    assert (sent, tree.pages, tree.resident_pages) == (["0.2", "0.1"], 3, 1)
    found = tree.match("n", [1, 2, 3, 4, 5, 6])
    assert found.items == ["0.0", "away 0.1", "away 0.2"]
    found.node.items[1:] = ["0.1", "0.2"]
    tree.settle(found.node)
    tree.check_integrity()
    assert tree.resident_pages == 3
    tree.evict(2, lambda item, priority: item)
    assert tree.evict_away(1) == ["0.2"]
    assert tree.evict(1) == ["0.1", "0.0"]  # what stands on a dropped page goes with it
    tree.check_integrity()
    assert tree.pages == 0


@pytest.mark.parametrize("salted", [False, True])
@pytest.mark.parametrize("size", [1, 16, 32])
@pytest.mark.parametrize("constant", [False, True])
def test_an_oracle_finds_the_same(size: int, salted: bool, constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A brute-force dictionary of all prefixes, over random operations; with every hash equal too."""
    if constant:
        monkeypatch.setattr(radix_node, "page_key", lambda page: 0)
    draw = random.Random(size + 2 * salted)
    tree: RadixTree[tuple[Any, ...]] = RadixTree(size, Clock())
    known: dict[Any, int] = {}
    locked: list[Any] = []
    for step in range(2_000 if constant else 20_000):
        space = draw.choice("ab") if salted else "a"
        text = [token for _ in range(draw.randrange(1, 6)) for token in [draw.choice((1, 2))] * size]
        text += [3] * draw.randrange(size)
        whole = len(text) // size
        pages = [(space, *text[: (page + 1) * size]) for page in range(whole)]
        choice = draw.random()
        if choice < 0.4:
            got = tree.match(space, text)
            expected = next((page for page in range(whole) if pages[page] not in known), whole)
            assert got.tokens == expected * size
            assert got.items == pages[:expected]
            if choice < 0.1:
                tree.lock(got.node)
                locked.append(got.node)
        elif choice < 0.8:
            tree.insert(space, text[: whole * size], pages, [draw.randrange(101) for _ in pages])
            known.update(dict.fromkeys(pages, 1))
        elif choice < 0.9 and locked:
            tree.unlock(locked.pop(draw.randrange(len(locked))))
        else:
            for item in tree.evict(draw.randrange(1, 5)):
                del known[item]
        assert tree.locked_pages <= tree.pages == len(known)
        if step % 100 == 0:
            tree.check_integrity()
    tree.check_integrity()


def test_many_pages_are_evicted_in_order_of_worth() -> None:
    draw = random.Random(0)
    tree: RadixTree[tuple[int, int]] = RadixTree(1, Clock())
    for text in range(20_000):
        worth = draw.randrange(101)
        tree.insert("n", [text + 1], [(worth, text)], [worth])
    gone = tree.evict(20_000)
    assert gone == sorted(gone)
    tree.check_integrity()


def test_no_salt_sees_another() -> None:
    tree: RadixTree[int] = RadixTree(1, Clock())
    tree.insert((("model", "m"), ("salt", "a")), [1, 2, 3], [1, 2, 3])
    others = [(("model", f"m{n}"), ("salt", "a")) for n in range(500)] + [
        (("model", "m"), ("salt", f"a{n}")) for n in range(500)
    ]
    assert sum(len(tree.match(other, [1, 2, 3]).items) for other in others) == 0


def test_pages_and_policies_mean_the_same_default() -> None:
    assert radix_node.DEFAULT_PRIORITY == rules.DEFAULT_PRIORITY == 35


def test_the_check_sees_what_is_wrong() -> None:
    for harm in (
        lambda tree, node: setattr(tree, "pages", 9),
        lambda tree, node: setattr(node, "locks", 1),
        lambda tree, node: node.items.pop(),
        lambda tree, node: setattr(node, "start", 4),
        lambda tree, node: setattr(node, "resident", 0),
        lambda tree, node: tree._resident.clear(),
    ):
        tree = tree_of([1, 2, 3, 4])
        harm(tree, next(tree.walk()))
        with pytest.raises(IntegrityError):
            tree.check_integrity()


def test_queues_do_not_grow_with_use_where_nothing_is_evicted() -> None:
    tree: RadixTree[int] = RadixTree(1)
    for first in range(3):
        tree.insert("", [first, 7, 8], [1, 2, 3], priorities=[90] * 3, durations=[100.0] * 3)
    for use in range(5_000):
        node = tree.match("", [use % 3, 7, 8]).node
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._resident._heap) + len(tree._resident._ends) < 600
    tree.check_integrity()
    assert len(tree.evict(100)) == 9


def test_a_namespace_without_texts_is_forgotten() -> None:
    tree: RadixTree[int] = RadixTree(1)
    for salt in range(100):
        tree.insert(salt, [1, 2], [1, 2])
        tree.evict(2)
    assert tree._roots == {}
    tree.insert("again", [1, 2], [1, 2])
    node = tree.match("again", [1, 2]).node
    assert node.namespace == "again"
