"""Forked rows and taking tokens back: which pages are shared, copied and released, and what is held afterwards."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.pages.integrity import violations
from hf_ctxopt.pages.storage import LayerStorage
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import Rig, numbers, spans

KEEP_ALL = SinkWindow()
SINKS = SinkWindow(sinks=2, window=6)


def content(storage: LayerStorage, pages: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of whole pages."""
    return storage.keys[:, pages].clone(), storage.values[:, pages].clone()


# ---- forks


def test_copy_on_write_in_mid_page_equals_independent_runs_and_leaves_the_parent_alone() -> None:
    rig = Rig(KEEP_ALL, page_size=4, layers=2)
    rig.step([list(range(6))])
    rig.group.select([0, 0, 0])
    parent = [page for _, page in rig.group.rows[0].pages()]
    assert (rig.group.pool.used, rig.group.pool.shared) == (2, 2)
    before = [content(storage, parent) for storage in rig.group.storages.values()]
    plan = rig.step([[100, 101], [200, 201], [300, 301]])[0].plan
    assert len(plan.copies) == 2  # the last holder writes where it is
    assert {source for source, _ in plan.copies} == {parent[1]}
    for layer, first in ((0, 100), (1, 200), (2, 300)):
        alone = Rig(KEEP_ALL, page_size=4, layers=2)
        alone.step([list(range(6))])
        alone.step([[first, first + 1]])
        assert rig.held(layer) == alone.held(0) == {**{t: t for t in range(6)}, 6: first, 7: first + 1}
        assert rig.held(layer, 1) == alone.held(0, 1)
    for storage, (keys, values) in zip(rig.group.storages.values(), before, strict=True):
        now_keys, now_values = content(storage, parent)
        assert torch.equal(now_keys[:, 0], keys[:, 0])  # the full page is shared still, byte for byte
        assert torch.equal(now_values[:, 0], values[:, 0])
        assert torch.equal(now_keys[:, 1, :2], keys[:, 1, :2])  # the parent's own part of the tail page
        assert torch.equal(now_values[:, 1, :2], values[:, 1, :2])
    assert rig.group.pool.shared == 1
    assert violations(rig.group) == []


def test_a_fork_at_a_page_boundary_copies_nothing() -> None:
    rig = Rig(KEEP_ALL, page_size=4)
    rig.step([list(range(8))])
    rig.group.select([0, 0])
    assert rig.step([[100], [200]])[0].plan.copies == []
    assert (rig.held(0)[8], rig.held(1)[8]) == (100, 200)


def test_selecting_rows_releases_those_that_go() -> None:
    rig = Rig(KEEP_ALL, page_size=4)
    rig.step([[1, 2, 3, 4, 5], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
    assert rig.group.pool.used == 6
    rig.layers[0].batch_select_indices(torch.tensor([2, 0]))
    assert rig.group.pool.used == 4
    assert (rig.held(0)[0], rig.held(1)[0]) == (21, 1)
    rig.layers[0].batch_select_indices(torch.tensor([False, True]))
    assert (rig.group.pool.used, rig.held(0)[4]) == (2, 5)


def test_the_group_moves_once_though_every_layer_is_told() -> None:
    rig = Rig(KEEP_ALL, layers=2)
    rig.step([[1, 2, 3], [4, 5, 6]])
    for layer in rig.layers:
        layer.reorder_cache(torch.tensor([1, 0]))
    assert (rig.held(0)[0], rig.held(1)[0]) == (4, 1)
    for layer in rig.layers:
        layer.crop(-1)
    assert [layer.get_seq_length() for layer in rig.layers] == [2, 2]


# ---- taking back


def test_crop_takes_back_any_number_where_nothing_is_evicted() -> None:
    rig = Rig(KEEP_ALL, page_size=4)
    rig.step(numbers(0, 1, 10))
    rig.group.crop(3)
    assert (rig.group.seen, spans(rig.held(0)), rig.group.pool.used) == (7, list(range(7)), 2)
    rig.step(numbers(50, 1, 2))
    assert rig.held(0) == {**{t: t for t in range(7)}, 7: 50, 8: 51}
    rig.group.crop(9)
    assert (rig.group.seen, rig.group.pool.used) == (0, 0)
    with pytest.raises(ConfigError, match="0 to -0, the tokens seen"):
        rig.group.crop(1)


def test_crop_ends_where_tokens_were_evicted() -> None:
    rig = Rig(SINKS)
    for token in range(20):
        rig.step([[token]])
    assert spans(rig.held(0)) == [0, 1, *range(14, 20)]
    was = rig.picture()
    with pytest.raises(ConfigError) as caught:
        rig.group.crop(2)  # query 18 sees token 13
    assert (caught.value.field, caught.value.value) == ("tokens_to_remove", -2)
    assert "activate_past_recording" in caught.value.allowed
    assert rig.picture() == was
    rig.group.crop(1)
    rig.step([[99]])
    assert rig.held(0) == {**{t: t for t in [0, 1, *range(14, 19)]}, 19: 99}


def test_a_recorded_step_can_be_taken_back_whole_or_in_part() -> None:
    for removed in (0, 1, 4, 5):
        rig = Rig(SINKS)
        for token in range(20):
            rig.step([[token]])
        rig.layers[0].activate_past_recording()
        rig.step(numbers(50, 1, 5))
        rig.group.crop(removed)
        rig.step([[99]])
        text = [*range(20), *range(50, 55 - removed), 99]
        seen = {t: text[t] for t in [0, 1, *range(len(text) - 6, len(text))]}
        assert seen.items() <= rig.held(0).items()


@pytest.mark.parametrize("tokens", [1, -1])
def test_crop_of_the_wrong_sign_or_too_much_is_refused(tokens: int) -> None:
    rig = Rig(KEEP_ALL)
    rig.step(numbers(0, 1, 4))
    with pytest.raises(ConfigError):
        rig.layers[0].crop(1 if tokens > 0 else -5)
    assert rig.group.seen == 4


@pytest.mark.parametrize("length", [4, 5])
def test_crop_where_the_window_is_a_single_token(length: int) -> None:
    rig = Rig(SinkWindow(window=1), page_size=2)
    for token in range(length):
        rig.step([[token]])
    rig.group.crop(1)
    assert violations(rig.group) == []
    rig.step([[99]])
    assert rig.held(0) == {length - 1: 99}


def test_skipping_keeps_the_sinks_only_and_moves_on() -> None:
    rig = Rig(SINKS, pads=[0, 3])
    rig.step(numbers(0, 2, 12))
    rig.group.skip(1000)
    assert (rig.group.seen, rig.layers[0].get_seq_length()) == (1012, 1012)
    assert (rig.held(0), rig.held(1)) == ({0: 0, 1: 1}, {0: 15, 1: 16})
    assert rig.group.pool.used == 2
    rig.step([[70, 71], [80, 81]])
    assert rig.held(0) == {0: 0, 1: 1, 1012: 70, 1013: 71}
    assert rig.held(1) == {0: 15, 1: 16, 1009: 80, 1010: 81}
    assert violations(rig.group) == []
    with pytest.raises(ConfigError):
        rig.group.crop(3)
