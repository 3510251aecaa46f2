"""What a radix tree must do over a long life: keep no more than it needs, do little for each call, expire for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_ctxopt.errors import IntegrityError
from hf_ctxopt.pages.eviction import SLACK
from hf_ctxopt.pages.radix import RadixTree
from tests.pages.radix_rig import Clock

Tree = RadixTree[int]


def entries(tree: Tree) -> int:
    """Everything that the tree's queues hold on to."""
    return sum(len(queue._heap) + len(queue._ends) for queue in (tree._resident, tree._away))


def test_uses_cost_no_memory() -> None:
    """A store that never fills never evicts: its queues must not grow with every match."""
    tree: Tree = RadixTree(2, Clock())
    for agent in range(8):
        tree.insert("n", [agent] * 20, list(range(10)), [80] * 10, [60.0] * 10)
    for turn in range(5_000):
        tree.match("n", [turn % 8] * 20)
    assert entries(tree) <= 2 * 8
    tree.check_integrity()


def test_what_left_the_tree_is_let_go_of() -> None:
    """Texts that come and go, behind a high priority and hours before theirs would end."""
    tree: Tree = RadixTree(1, Clock())
    tree.insert("n", [0], [0], [90])
    for turn in range(2_000):
        tree.insert("n", [turn + 1], [0], [80], [3600.0])
        tree.insert("n", [turn + 1, 7], [0, 0], [None, 10])
        tree.evict(2)
    assert tree.pages == 1
    assert entries(tree) <= 2 * SLACK
    tree.check_integrity()


def test_work_per_eviction_does_not_grow_with_the_tree() -> None:
    """50,000 pages, every leaf used again and again in between. Entries that come up are counted, nothing is timed."""
    tree: Tree = RadixTree(1, Clock())
    for chat in range(500):
        tree.insert("n", [chat, *range(99)], list(range(100)), [90, *[None] * 99])
    for _ in range(5):
        for chat in range(500):
            tree.match("n", [chat, *range(99)])
    assert tree.pages == 50_000
    assert len(tree.evict(30_000)) == 30_000
    for _ in range(20_000):
        tree.evict(1)
    assert tree.pages == 0
    assert tree._resident.draws < 50_000 + 4 * 500
    tree.check_integrity()


def test_an_emptied_namespace_is_forgotten() -> None:
    tree: Tree = RadixTree(2, Clock())
    for salt in range(100):
        tree.match(("salt", salt), [1, 2, 3])
        tree.insert(("salt", salt), [], [])
        assert tree.roots() == []
        node = tree.insert(("salt", salt), [1, 2], [0]).node
        assert [space for space, _ in tree.roots()] == [node.namespace] == [("salt", salt)]
        tree.evict(1)
    assert not tree._roots
    tree.check_integrity()


def test_a_long_conversation_is_dropped_with_its_second_tier() -> None:
    """A node for each of 2,000 turns: more than Python recurses. Nothing may be left half done."""
    tree: Tree = RadixTree(1, Clock())
    for turn in range(1, 2_000):
        tree.insert("n", list(range(turn)), list(range(turn)))
    assert tree.evict(1_998, lambda item, priority: item) == []
    tree.check_integrity()
    assert sorted(tree.evict(1)) == list(range(1_999))
    assert (tree.pages, tree.resident_pages) == (0, 0)
    tree.check_integrity()


def test_only_who_holds_a_node_can_let_go_of_it() -> None:
    """A node that is held by way of those behind it only is not the caller's to unlock."""
    tree: Tree = RadixTree(1, Clock())
    lower = tree.insert("n", [1, 2, 3], [1, 2, 3]).node
    tree.lock(lower)
    upper = tree.match("n", [1, 2]).node
    with pytest.raises(IntegrityError, match="more often"):
        tree.unlock(upper)
    tree.check_integrity()
    tree.lock(upper)
    tree.unlock(upper)
    tree.check_integrity()
    assert tree.locked_pages == 3


def test_the_longest_begun_page_among_many() -> None:
    tree: RadixTree[str] = RadixTree(4, Clock())
    for text in ("abXX", "abcX", "aXXX", "abcc", "abda", "zzzz"):
        tree.insert("n", [*map(ord, text)], [text])
    tree.check_integrity()
    for text, tokens in (("abcz", 3), ("abca", 3), ("abzz", 2), ("abdz", 3), ("aaaa", 1), ("zz", 2), ("yyyy", 0)):
        partial = tree.match("n", [*map(ord, text)]).partial
        assert (partial[1] if partial else 0) == tokens
        assert partial is None or partial[0][:tokens] == text[:tokens]


class TestTime:
    """TensorRT-LLM's `TimedBlockTest`, and that a priority is over at its end and for good (`refresh`)."""

    def test_timed_blocks_at_0_2_5_and_9(self) -> None:
        clock = Clock()
        tree: Tree = RadixTree(1, clock)
        first = tree.insert("n", [0], [0], [80], [1.0]).node
        assert first.priority(0, clock.now) == 80
        clock.now = 2.0
        assert first.priority(0, clock.now) == 35
        one = tree.insert("n", [1], [1], [80], [3.0]).node
        two = tree.insert("n", [2], [2], [50], [8.0]).node
        tree.lock(one)
        tree.lock(two)
        assert tree.evict(1) == [0]
        clock.now = 5.0
        tree.unlock(one)
        tree.unlock(two)
        assert (one.priority(0, 5.0), two.priority(0, 5.0)) == (80, 50)
        clock.now = 9.0
        assert (one.priority(0, 9.0), two.priority(0, 9.0)) == (35, 50)
        tree.check_integrity()
        assert tree.evict(2) == [1, 2]

    @pytest.mark.parametrize("use", ["match", "insert", "lock"])
    def test_a_later_use_does_not_bring_a_priority_back(self, use: str) -> None:
        clock = Clock()
        tree: Tree = RadixTree(1, clock)
        node = tree.insert("n", [0], [0], [80], [5.0]).node
        clock.now = 5.0
        if use == "match":
            tree.match("n", [0])
        elif use == "insert":
            tree.insert("n", [0], [0])
        else:
            tree.lock(node)
            tree.unlock(node)
        assert (node.priority(0, clock.now), node.durations) == (35, [None])

    def test_a_new_value_counts_from_its_own_use(self) -> None:
        clock = Clock()
        tree: Tree = RadixTree(1, clock)
        node = tree.insert("n", [0], [0], [80], [5.0]).node
        clock.now = 100.0
        tree.insert("n", [0], [0], [70], [5.0])
        assert node.priority(0, 104.9) == 70
        assert node.priority(0, 105.0) == 35

    def test_a_held_page_does_not_expire(self) -> None:
        clock = Clock()
        tree: Tree = RadixTree(1, clock)
        node = tree.insert("n", [0], [0], [80], [5.0]).node
        tree.lock(node)
        clock.now = 100.0
        tree.match("n", [0])
        tree.unlock(node)
        assert (node.priority(0, 104.9), node.priority(0, 105.0)) == (80, 35)

    def test_pages_of_one_run_expire_one_by_one_also_after_a_split(self) -> None:
        clock = Clock()
        tree: Tree = RadixTree(1, clock)
        lower = tree.insert("n", [0, 1, 2], [0, 1, 2], [80, 70, 60], [9.0, 2.0, 5.0]).node
        upper = tree.match("n", [0]).node
        for now, worth in ((1.0, [80, 70, 60]), (2.0, [80, 35, 60]), (5.0, [80, 35, 35]), (9.0, [35, 35, 35])):
            clock.now = now
            assert [upper.priority(0, now), lower.priority(0, now), lower.priority(1, now)] == worth
            tree.check_integrity()


@pytest.mark.parametrize(
    "harm",
    [
        lambda tree, node: setattr(node, "handles", 1),
        lambda tree, node: setattr(node, "namespace", "other"),
        lambda tree, node: node._firsts.reverse(),
        lambda tree, node: node._sorted.reverse(),
        lambda tree, node: tree._roots.__setitem__("empty", tree.match("none", [1]).node),
        lambda tree, node: tree._resident._keys.clear(),
        lambda tree, node: tree._resident._heap.clear(),
    ],
)
def test_the_check_sees_what_is_wrong(harm: Callable[[Tree, Any], None]) -> None:
    tree: Tree = RadixTree(1, Clock())
    tree.insert("n", [1, 2, 3], [0, 1, 2], [80, 70, 60], [5.0, 5.0, 5.0])
    tree.insert("n", [1, 2, 4], [0, 1, 2])
    tree.check_integrity()
    harm(tree, next(tree.walk()))
    with pytest.raises(IntegrityError):
        tree.check_integrity()
