"""Each of a monitor's actions: what it may touch, what it says it has done, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.pages.sealed import SealedPart
from hf_ctxopt.pages.storage import LayerStorage
from hf_ctxopt.planner.actions import drop_prefixes, seal_colder, shrink_windows
from hf_ctxopt.planner.monitor import Action, Monitor
from tests.cli.tiny import tiny_model
from tests.faults.test_allocation import ERRORS
from tests.feeding import feed

ANY: dict[str, Callable[[], BaseException]] = {**ERRORS, "python": MemoryError}


def text(seq: int) -> Tensor:
    """Ids `(1, seq)`."""
    return torch.randint(2, 258, (1, seq), generator=torch.Generator().manual_seed(9))


def filled(model: Any, seq: int, name: str = "ctx_paged", **options: Any) -> PageCache:
    """A cache that has read so many tokens."""
    cache = hf_ctxopt.make_cache(model, name, **{"page_size": 8, **options})
    feed(model, text(seq), cache, chunk=50)
    return cache


def window(cache: PageCache) -> Any:
    """Window of the cache's first layers."""
    policy: Any = cache.groups[0].policy
    return policy.window


def test_bits_stay_where_no_page_would_be_sealed() -> None:
    """An unused cache, and one shorter than a page: fewer bits free nothing and harm a text to come."""
    model = tiny_model()
    idle = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
    short, one_page = filled(model, 20, page_size=32), filled(model, 8)  # of which the first page stays open
    busy, least = filled(model, 200, kv_bits=8), filled(model, 200, kv_bits=4)
    monitor = Monitor(lambda: 0.99, [seal_colder(lambda: [idle, short, one_page, least])])
    assert monitor.poll() == []
    assert [cache.options.kv_bits for cache in (idle, short, one_page)] == [16] * 3
    monitor = Monitor(lambda: 0.99, [seal_colder(lambda: [idle, busy])])
    assert [event.action for event in monitor.poll()] == ["seal_colder"]
    assert (idle.options.kv_bits, busy.options.kv_bits) == (16, 4)
    feed(model, text(48), one_page, chunk=20)
    assert seal_colder(lambda: [one_page]).act() > 0


def test_fewer_bits_are_told_of_even_where_no_byte_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tiny_model(), 100)
    monkeypatch.setattr(PageCache, "nbytes", property(lambda cache: 4096))
    assert seal_colder(lambda: [cache]).act() == 1
    assert cache.options.kv_bits == 8


@pytest.mark.parametrize(
    "make",
    [
        *(lambda value=value: shrink_windows(list, least=value) for value in (-3, 0, 2.5, True, "8", None)),
        *(lambda value=value: drop_prefixes(list, share=value) for value in (-1, 0, 0.25, True)),
        *(lambda value=value: seal_colder(list, steps=value) for value in ((), (8.0, 4.0), (4, 8), "84", 8, (True,))),
    ],
)
def test_bad_arguments(make: Callable[[], Action]) -> None:
    with pytest.raises(ConfigError, match="least|share|steps"):
        make()


@pytest.mark.parametrize("error", ANY)
def test_a_host_without_memory_is_no_error_of_the_monitors(
    error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = filled(tiny_model(), 100)

    def fails(part: SealedPart, *_: Any) -> SealedPart:
        raise ANY[error]()

    monkeypatch.setattr(SealedPart, "recoded", fails)
    monitor = Monitor(lambda: 0.99, [seal_colder(lambda: [cache])])
    with caplog.at_level(logging.WARNING):
        monitor.poll()
    assert "pages stay as they are" in caplog.text
    assert cache.options.kv_bits == 16
    cache.check_integrity()


def test_another_error_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tiny_model(), 100)

    def fails(part: SealedPart, *_: Any) -> SealedPart:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(SealedPart, "recoded", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        seal_colder(lambda: [cache]).act()


@pytest.mark.parametrize("error", ANY)
@pytest.mark.parametrize("bits", [16, 8])
def test_no_memory_to_move_pages_together(
    bits: int, error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The larger storage stays, and the text goes on."""
    model = tiny_model()
    cache = filled(model, 200, "ctx_sink", sinks=4, window=128, kv_bits=bits)

    def fails(storage: LayerStorage, *_: Any) -> Any:
        raise ANY[error]()

    assert shrink_windows(lambda: [cache], least=16).act() == 1
    before = cache.nbytes
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(LayerStorage, "compacted_sealed" if bits == 8 else "compacted", fails)
        feed(model, text(12), cache, chunk=1)
    assert "a larger storage stays" in caplog.text
    cache.check_integrity()
    feed(model, text(12), cache, chunk=1)
    assert cache.nbytes < before / 2


def test_windows_of_caches_made_since_shrink_too() -> None:
    model = tiny_model()
    made = [filled(model, 80, "ctx_sink", sinks=4, window=100)]
    uses = iter([0.91, 0.95, 0.96, 0.5])
    now = [0.0]
    monitor = Monitor(lambda: now[0], [shrink_windows(lambda: made, least=16)])
    found = []
    for use in uses:
        now[0] = use
        found.append([(event.kind, event.amount) for event in monitor.poll()])
        made.append(filled(model, 80, "ctx_sink", sinks=4, window=90))
    assert found == [[("act", 1)], [("act", 1)], [], [("undo", 0)]]
    assert [window(cache) for cache in made[:3]] == [100, 90, 90]


@pytest.mark.parametrize("make", [seal_colder, shrink_windows])
def test_caches_of_others_are_passed_over(make: Callable[..., Action]) -> None:
    model = tiny_model()
    others = [DynamicCache(config=model.config), None, EncoderDecoderCache(DynamicCache(), DynamicCache())]
    assert make(lambda: others).act() == 0
    ours = filled(model, 100, "ctx_sink", sinks=4, window=300)
    assert make(lambda: [*others, EncoderDecoderCache(ours, DynamicCache())]).act() > 0
    assert ours.options.kv_bits == 8 or window(ours) == 256
