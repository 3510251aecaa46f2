"""A step of a cache with several layer groups: room for all of them, or no change to any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ctxopt.caches.context import ATTENTION, CacheContext
from hf_ctxopt.caches.layer import PageLayer
from hf_ctxopt.errors import CacheFullError, InterruptedStepError
from hf_ctxopt.pages.budget import Budget
from hf_ctxopt.pages.group import LayerGroup
from hf_ctxopt.pages.integrity import violations
from hf_ctxopt.policies.sink_window import SinkWindow

PAGE = 4
ONE = 2 * 4
"""Bytes of a token's K and V in one layer of head size 1, float32."""


class Hybrid:
    """Layer 0 keeps a window of 6, layers 1 and 2 keep all and have `wide` channels."""

    def __init__(self, budget: int | str | None, wide: int = 1) -> None:
        shared = Budget(budget)
        self.groups = [
            LayerGroup([0], SinkWindow(window=6), PAGE, shared),
            LayerGroup([1, 2], SinkWindow(), PAGE, shared),
        ]
        context = CacheContext(SimpleNamespace(_attn_implementation=ATTENTION))
        groups = [self.groups[0], self.groups[1], self.groups[1]]
        self.layers = [PageLayer(group, index, context, None, False) for index, group in enumerate(groups)]
        self.sizes = (1, wide, wide)

    def step(self, tokens: int, layers: int = 3) -> None:
        for layer, size in list(zip(self.layers, self.sizes, strict=True))[:layers]:
            states = torch.ones(1, 1, tokens, size)
            layer.update(states, -states)

    def picture(self) -> Any:
        rows = [[(r.length, r.lower, list(r.pages())) for r in group.rows] for group in self.groups]
        return rows, [(g.seen, dict(g.progress), g.arena.nbytes, g.pool.used, g.pool.capacity) for g in self.groups]


@pytest.mark.parametrize("tokens", [3, 5, 30])
@pytest.mark.parametrize("budget", [12, f"{12 * 3 * ONE}B"])
def test_a_group_without_room_stops_the_others_too(budget: int | str, tokens: int) -> None:
    cache = Hybrid(budget)
    cache.step(10)
    was = cache.picture()
    with pytest.raises(CacheFullError) as caught:
        cache.step(tokens)
    assert (caught.value.needed, caught.value.room) == (-(-(10 + tokens) // PAGE) * PAGE, 12)
    assert cache.picture() == was
    cache.step(2)
    assert [group.seen for group in cache.groups] == [12, 12]


def test_slack_for_one_group_never_takes_what_another_needs() -> None:
    """2 window pages and 5 pages of two layers fit exactly; an eighth more for the first would not leave them."""
    cache = Hybrid(f"{(2 + 2 * 5) * PAGE * ONE}B")
    cache.step(20)
    assert [group.pool.used for group in cache.groups] == [2, 5]


def test_a_first_step_that_wider_layers_turn_down_leaves_an_empty_cache() -> None:
    """Nobody knows the size of a layer before it arrives: the narrow first one has stored its tokens already."""
    cache = Hybrid(f"{150 * ONE}B", wide=8)
    with pytest.raises(CacheFullError):
        cache.step(12)
    assert [(group.seen, group.pool.used) for group in cache.groups] == [(0, 0), (0, 0)]
    cache.step(2)
    assert [violations(group) for group in cache.groups] == [[], []]
    assert sum(group.arena.nbytes for group in cache.groups) <= 150 * ONE


def test_a_step_that_stopped_between_two_groups_is_noticed() -> None:
    cache = Hybrid(None)
    cache.step(10)
    cache.step(1, layers=1)
    with pytest.raises(InterruptedStepError, match="settle"):
        cache.step(1)
    cache.groups[0].crop(1)
    cache.step(1)
    assert [group.seen for group in cache.groups] == [11, 11]


def test_a_refused_step_can_be_asked_for_again_with_another_length() -> None:
    cache = Hybrid(12)
    cache.step(8)
    for tokens in (5, 6, 7):
        with pytest.raises(CacheFullError):
            cache.step(tokens)
    cache.step(4)
    assert [violations(group) for group in cache.groups] == [[], []]
