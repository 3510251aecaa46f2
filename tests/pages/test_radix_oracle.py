"""The radix tree against a dictionary of all prefixes: limits, begun pages, locks, priorities, time, eviction order.

`test_radix.py` compares match lengths over longer programs of whole pages.
"""

from __future__ import annotations

import random

import pytest

from hf_ctxopt.pages import radix_node
from tests.pages.radix_rig import Checked

OPERATIONS = 5_000
MOST_PAGES = 60


def random_program(checked: Checked, rng: random.Random, namespaces: list[object], operations: int) -> None:
    """Texts that branch off earlier ones anywhere, inside pages too; a budget keeps evictions coming."""
    size, texts = checked.size, [()]
    for _ in range(operations):
        namespace = rng.choice(namespaces)
        start = rng.choice(texts)
        start = start[: rng.randint(0, len(start))]
        text = (*start, *rng.choices(range(3), k=rng.randint(0, 3 * size)))[: 6 * size]
        texts = [*texts[-20:], text]
        checked.clock.now += rng.choice([0, 0, 0.5, 3])
        draw = rng.random()
        if draw < 0.45:
            limit = rng.choice([None, len(text) - 1, rng.randint(0, len(text))])
            node = checked.match(namespace, text, None if limit is None else max(0, limit))
            if rng.random() < 0.2 and len(checked.handles) < 6:
                checked.lock(node)
        elif draw < 0.80:
            pages = len(text) // size
            priorities = [rng.choice([None, 0, 35, 80]) for _ in range(pages)] if rng.random() < 0.5 else None
            durations = [rng.choice([None, 2.0, 9.0]) for _ in range(pages)] if rng.random() < 0.5 else None
            checked.insert(namespace, text, priorities, durations, merge=rng.random() < 0.1)
        elif draw < 0.90:
            if checked.handles:
                checked.unlock(rng.randrange(len(checked.handles)))
        elif draw < 0.999:
            checked.evict(rng.randint(1, 4))
        else:
            checked.clear()
        if checked.tree.pages > MOST_PAGES:
            checked.evict(checked.tree.pages - MOST_PAGES)
    checked.walk()


@pytest.mark.parametrize("page_size", [1, 16, 32])
@pytest.mark.parametrize("namespaces", [[None], [("fp", "a"), ("fp", "b"), ("fp", None)]], ids=["alone", "salted"])
def test_random_operations_agree_with_a_dictionary(page_size: int, namespaces: list[object]) -> None:
    random_program(Checked(page_size, every=50), random.Random(page_size), namespaces, OPERATIONS)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_hash_that_is_constant_changes_nothing(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_node, "page_key", lambda page: 0)
    random_program(Checked(page_size, every=50), random.Random(7), [None, ("fp", "a")], 3_000)
