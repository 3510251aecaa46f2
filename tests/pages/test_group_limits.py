"""A layer group when a step stops half-way, does not fit its budget, or finds its counts wrong."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt.errors import CacheFullError, ConfigError, InterruptedStepError
from hf_ctxopt.pages.integrity import check, violations
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import TOKEN_BYTES, Rig, numbers, spans

KEEP_ALL = SinkWindow()
SINKS = SinkWindow(sinks=2, window=6)


# ---- interruptions


def test_an_interrupted_step_is_noticed_and_taken_back() -> None:
    rig = Rig(SINKS)
    for token in range(20):
        rig.step([[token]])
    was = rig.picture()
    rig.update(0, torch.tensor([[20]]))
    with pytest.raises(InterruptedStepError, match="settle"):
        rig.update(0, torch.tensor([[21]]))
    assert rig.group.settle() == 20
    seen = {t: t for t in [0, 1, *range(15, 20)]}
    assert seen.items() <= rig.held(0).items() <= was[3][0][0].items()
    rig.step([[20]])
    assert rig.held(0) == {t: t for t in [0, 1, *range(15, 21)]} == rig.held(0, 1)


def test_settling_a_group_that_is_whole_changes_nothing() -> None:
    rig = Rig(KEEP_ALL)
    assert rig.group.settle() == 0
    rig.step(numbers(0, 1, 5))
    was = rig.picture()
    assert rig.group.settle() == 5
    assert rig.picture() == was


def test_an_interrupted_first_step_longer_than_the_window_leaves_an_empty_cache() -> None:
    rig = Rig(SINKS)
    rig.update(0, numbers(0, 1, 50))
    assert rig.group.settle() == 0
    assert (rig.group.held(), rig.group.dense_length(1)) == (0, 0)
    rig.step(numbers(0, 1, 5))
    assert rig.held(0, 1) == {t: t for t in range(5)}


def test_an_interrupted_first_step_can_be_settled_after_a_vain_second_one() -> None:
    rig = Rig(KEEP_ALL)
    rig.update(0, numbers(0, 1, 5))
    with pytest.raises(InterruptedStepError):
        rig.step(numbers(0, 1, 5))
    assert rig.group.settle() == 0
    rig.step(numbers(0, 1, 5))
    assert rig.held(0, 1) == {t: t for t in range(5)}


def test_a_reset_forgets_that_a_step_was_interrupted() -> None:
    rig = Rig(KEEP_ALL)
    rig.update(0, numbers(0, 1, 5))
    with pytest.raises(InterruptedStepError):
        rig.step(numbers(0, 1, 5))
    rig.group.reset()
    rig.step(numbers(10, 1, 3))
    assert rig.group.settle() == 3
    assert rig.held(0, 1) == {0: 10, 1: 11, 2: 12}


def test_rows_that_were_repeated_before_all_was_taken_back_stay_after_an_interrupted_first_step() -> None:
    rig = Rig(SinkWindow(), pads=[1])
    rig.step(numbers(0, 1, 3))
    rig.layers[0].batch_repeat_interleave(2)
    rig.layers[0].crop(-3)
    rig.update(0, numbers(3, 2, 4))
    assert rig.group.settle() == 0
    rig.step(numbers(11, 2, 4))
    assert [rig.held(row) for row in range(2)] == [{0: 12, 1: 13, 2: 14}, {0: 16, 1: 17, 2: 18}]


def test_an_interrupted_fork_keeps_the_tail_of_every_layer() -> None:
    """The first layer copied the shared tail page, the second did not get to it."""
    rig = Rig(KEEP_ALL, page_size=4, layers=2)
    rig.step([list(range(6))])
    rig.group.select([0, 0])
    rig.update(0, torch.tensor([[100], [200]]))
    rig.group.settle()
    for layer in range(2):
        assert rig.held(0, layer) == rig.held(1, layer) == {t: t for t in range(6)}, layer
    rig.step([[100], [200]])
    assert (rig.held(0, 1)[6], rig.held(1, 1)[6]) == (100, 200)


def test_an_interrupted_chunk_longer_than_the_window_needs_a_reset() -> None:
    rig = Rig(SINKS)
    rig.step(numbers(0, 1, 8))
    rig.update(0, numbers(8, 1, 30))
    with pytest.raises(InterruptedStepError, match="reset"):
        rig.group.settle()
    rig.group.reset()
    rig.step(numbers(0, 1, 8))
    assert rig.held(0, 1) == {t: t for t in range(8)}


# ---- limits


@pytest.mark.parametrize(("budget", "room"), [(12, 12), (15, 12), (f"{12 * 2 * TOKEN_BYTES}B", 12)])
def test_a_step_over_the_budget_changes_nothing(budget: int | str, room: int) -> None:
    rig = Rig(KEEP_ALL, page_size=4, layers=2, budget=budget)
    rig.step(numbers(0, 1, 10))
    was = rig.picture()
    with pytest.raises(CacheFullError, match="raise `budget`") as caught:
        rig.step(numbers(10, 1, 3))
    assert (caught.value.needed, caught.value.room) == (16, room)
    assert rig.picture() == was
    rig.step(numbers(10, 1, 2))
    assert spans(rig.held(0)) == list(range(12))
    assert rig.group.arena.nbytes == 12 * 2 * TOKEN_BYTES


def test_a_refused_step_evicts_nothing_and_the_last_one_can_still_be_taken_back() -> None:
    rig = Rig(SINKS, page_size=1, budget=8)
    for token in range(20):
        rig.step([[token]])
    was = rig.picture()
    rig.group.recording = True
    with pytest.raises(CacheFullError):
        rig.step(numbers(20, 1, 5))
    assert rig.picture() == was
    rig.group.crop(1)
    rig.step([[99]])
    assert rig.held(0) == {**{t: t for t in [0, 1, *range(14, 19)]}, 19: 99}


def test_a_refused_first_step_does_not_fix_the_batch() -> None:
    rig = Rig(KEEP_ALL, page_size=4, budget=8)
    with pytest.raises(CacheFullError):
        rig.step(numbers(0, 3, 4))
    rig.step(numbers(0, 2, 4))
    assert rig.group.pool.used == 2


def test_a_window_at_its_budget_never_runs_out() -> None:
    rig = Rig(SINKS, page_size=4, budget=16)  # exactly the bound of 4 pages
    for start in range(0, 300, 3):
        rig.step(numbers(start, 1, 3))
    assert rig.group.arena.nbytes == 16 * 2 * TOKEN_BYTES


def test_a_forked_window_at_its_budget_never_runs_out() -> None:
    for chunk in (1, 2, 3, 5, 9, 20):
        rig = Rig(SINKS, page_size=4, budget=32)  # twice the bound of 4 pages
        rig.step(numbers(0, 1, 14))
        rig.group.select([0, 0])
        for start in range(100, 300, 2 * chunk):
            rig.step(numbers(start, 2, chunk))
            if start % 3 == 0:
                rig.group.select([1, 1])
        assert violations(rig.group) == []


def test_forks_of_a_tail_page_need_one_copy_less_than_there_are_rows() -> None:
    rig = Rig(KEEP_ALL, page_size=4, budget=16)
    rig.step([list(range(6))])
    rig.group.select([0, 0, 0])
    rig.step([[100], [200], [300]])  # the shared page, and three tails of which one is there
    assert rig.group.pool.used == 4
    with pytest.raises(CacheFullError):
        rig.step(numbers(400, 3, 2))


def test_forks_whose_tail_is_dropped_by_the_step_need_no_copy_of_it() -> None:
    rig = Rig(SinkWindow(window=6), page_size=2, budget=12)
    rig.step([[0, 1, 2]])
    rig.group.select([0, 0])
    rig.step(numbers(100, 2, 6))  # each row ends with tokens 4 to 8 in three pages of its own
    assert (rig.group.pool.used, spans(rig.held(1))) == (6, [4, 5, 6, 7, 8])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_another_size_is_refused_by_name(batch: int) -> None:
    rig = Rig(KEEP_ALL, pads=[0, 1])
    with pytest.raises(ConfigError) as caught:
        rig.step(numbers(0, batch, 2))
    assert caught.value.field == "attention_mask"
    rig.step(numbers(0, 2, 2))
    with pytest.raises(ConfigError) as caught:
        rig.step(numbers(0, batch, 2))
    assert (caught.value.field, caught.value.value) == ("batch", batch)
    assert violations(rig.group) == []


def test_integrity_check_names_and_repairs_wrong_counts(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(KEEP_ALL)
    rig.step(numbers(0, 1, 5))
    rig.group.pool.share([1])
    assert violations(rig.group) == ["page 1 has 2 references, 1 holders"]
    check(rig.group, strict=False)
    assert "page 1 has 2 references" in caplog.text
    assert violations(rig.group) == []
    rig.group.rows[0].length += 1
    assert violations(rig.group) == ["row 0 has 6 tokens, 5 were seen"]
