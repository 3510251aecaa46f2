"""What sealed pages cost, and what a step does to them, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_ctxopt.caches.context import ATTENTION, CacheContext
from hf_ctxopt.caches.layer import PageLayer
from hf_ctxopt.caches.options import PageOptions
from hf_ctxopt.errors import CacheFullError
from hf_ctxopt.pages.budget import Budget
from hf_ctxopt.pages.group import LayerGroup
from hf_ctxopt.pages.integrity import violations
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import Rig, exact, numbers

KEEP_ALL = SinkWindow()


class Lengths:
    """One bf16 layer that is fed random states; says how many bits it holds for each value of the text."""

    def __init__(self, bits: int, head_dim: int, expected: int | None) -> None:
        codecs = PageOptions(kv_bits=bits).codecs(SinkWindow())
        self.group = LayerGroup([0], KEEP_ALL, 32, Budget(), expected=expected, codecs=codecs)
        context = CacheContext(SimpleNamespace(_attn_implementation=ATTENTION))
        self.layer, self.head_dim, self.tokens = PageLayer(self.group, 0, context, None, False), head_dim, 0

    def feed(self, tokens: int) -> float:
        states = torch.randn(1, 1, tokens, self.head_dim, dtype=torch.bfloat16)
        self.layer.update(states, states)
        self.tokens += tokens
        return 8 * self.group.arena.nbytes / (2 * self.tokens * self.head_dim)


@pytest.mark.parametrize("expected", [None, 4500, 20_000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bits_per_value_at_any_length_from_4096_tokens_on(
    bits: int, head_dim: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales, open pages and room to grow included: 9, 5 and 3 bits."""
    monkeypatch.setenv("CTXOPT_DEBUG", "0")
    cache, most = Lengths(bits, head_dim, expected), bits + 1.0
    cache.feed(4000)
    cache.feed(96)
    held = [cache.feed(1) for _ in range(200)]
    held += [cache.feed(tokens) for tokens in [37, 333, 1, 1, 500, 7, 1, 640, 29, 3, *[97] * 30]]
    held += [cache.feed(1) for _ in range(70)]
    assert max(held) <= most, held.index(max(held))
    assert violations(cache.group) == []


def test_a_page_is_sealed_when_the_step_after_its_last_token_begins() -> None:
    rig = Rig(KEEP_ALL, page_size=4, codecs=exact(1))
    rig.step(numbers(0, 1, 7))
    assert rig.group.arena.used == (2, 0)
    rig.step([[7]])
    assert rig.group.arena.used == (2, 0)  # full, and can still be taken back
    rig.step([[8]])
    assert rig.group.arena.used == (2, 1)
    rig.step([[9]])
    assert list(rig.held(0).values()) == list(range(10))
    assert rig.account_errors() == []


def test_a_chunk_seals_what_it_fills_and_open_pages_stay_few() -> None:
    rig = Rig(KEEP_ALL, page_size=4, codecs=exact(1))
    for start, queries in ((0, 6), (6, 11), (17, 20), (37, 3)):
        rig.step(numbers(start, 1, queries))
        assert rig.group.arena.used.open <= 2
        assert rig.group.pool.capacity == 2
    assert rig.group.arena.used == (1, 9)
    assert list(rig.held(0).values()) == list(range(40))


def test_forks_share_the_page_they_seal() -> None:
    rig = Rig(KEEP_ALL, page_size=4, codecs=exact())
    rig.step(numbers(0, 1, 4)[:, :3])
    rig.step([[3]])
    rig.group.select([0, 0, 0])
    rig.step([[10], [20], [30]])
    assert (rig.group.arena.used, rig.group.sealed.shared) == ((3, 1), 1)
    assert [list(rig.held(row).values()) for row in range(3)] == [[0, 1, 2, 3, own] for own in (10, 20, 30)]
    rig.group.crop(2)  # into the sealed page: it is begun again, once for all three
    assert (rig.group.arena.used, rig.group.pool.shared) == ((1, 0), 1)
    assert list(rig.held(2).values()) == [0, 1, 2]
    assert rig.account_errors() == []


def test_a_budget_counts_both_kinds() -> None:
    rig = Rig(KEEP_ALL, page_size=4, layers=1, budget=16, codecs=exact(1))
    rig.step(numbers(0, 1, 13))
    assert sum(rig.group.arena.used) == 4
    for token in (13, 14, 15):
        rig.step([[token]])
    with pytest.raises(CacheFullError) as caught:
        rig.step([[16]])
    assert (caught.value.needed, caught.value.room) == (20, 16)
    assert list(rig.held(0).values()) == list(range(16))


def test_a_budget_in_bytes_holds_more_tokens_of_fewer_bits() -> None:
    held = {}
    for bits in (16, 8, 4):
        codecs = PageOptions(kv_bits=bits).codecs(SinkWindow())
        group = LayerGroup([0], KEEP_ALL, 32, Budget("100KB"), codecs=codecs)
        layer = PageLayer(group, 0, CacheContext(SimpleNamespace(_attn_implementation=ATTENTION)), None, False)
        states = torch.randn(1, 1, 32, 64, dtype=torch.bfloat16)
        while group.seen < 3200:
            try:
                layer.update(states, states)
            except CacheFullError:
                break
        assert group.arena.nbytes <= 100_000
        held[bits] = group.seen
    assert held[16] == 12 * 32
    assert held[8] > 1.6 * held[16]
    assert held[4] > 2.7 * held[16]


@pytest.mark.parametrize("policy", [SinkWindow(sinks=2, window=9), SinkWindow(window=17)])
def test_a_windows_memory_stays_the_same_however_long_the_text(policy: SinkWindow) -> None:
    rig = Rig(policy, page_size=4, codecs=exact(1 if policy.sinks else 0))
    sizes = set()
    for start in range(200):
        rig.step([[start]])
        if start > 60:
            sizes.add(rig.group.arena.nbytes)
    assert len(sizes) == 1
