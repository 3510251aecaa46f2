"""Layer groups: what one step does to pages, table and storages, with exact expectations.

Random programs of the same moves are in `tests/properties/test_pages_machine.py`.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from hf_ctxopt.errors import CacheFullError, ConfigError, InterruptedStepError
from hf_ctxopt.pages.integrity import check, violations
from hf_ctxopt.pages.storage import LayerStorage
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import TOKEN_BYTES, Rig, numbers

KEEP_ALL = SinkWindow()
SINKS = SinkWindow(sinks=2, window=6)


def spans(tokens: dict[int, int]) -> list[int]:
    """The tokens held, sorted."""
    return sorted(tokens)


def content(storage: LayerStorage, pages: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of whole pages."""
    return storage.keys[:, pages].clone(), storage.values[:, pages].clone()


# ---- memory


@pytest.mark.parametrize("feed", [1, 7, 120], ids=lambda size: f"chunks_of_{size}")
@pytest.mark.parametrize(("sinks", "window"), [(4, 16), (0, 16), (5, 17), (1, 1), (8, 2), (3, 33)])
@pytest.mark.parametrize(("page", "rows"), [(8, 1), (4, 3), (1, 2)])
def test_bytes_of_a_full_window_follow_the_formula(sinks: int, window: int, page: int, rows: int, feed: int) -> None:
    rig = Rig(SinkWindow(sinks, window), page, layers=2)
    sizes = set()
    for start in range(0, 120, feed):
        rig.step(numbers(start * rows, rows, min(feed, 120 - start)))
        if start >= 60 and window > 1:  # of a chunk, a window of one token leaves nothing but the sinks
            sizes.add(rig.group.nbytes)
    for start in (120, 121):
        rig.step(numbers(start * rows, rows, 1))
        sizes.add(rig.group.nbytes)
    pages = rows * (-(-sinks // page) + -(-(window - 1) // page) + 1)
    assert sizes == {pages * page * 2 * TOKEN_BYTES}


def test_bytes_of_a_cache_that_keeps_everything_follow_what_is_expected() -> None:
    rig = Rig(KEEP_ALL, page_size=4, layers=2, expected=30)
    rig.step(numbers(0, 1, 25))
    for start in range(25, 30):
        rig.step(numbers(start, 1, 1))
    assert rig.group.pool.capacity == 8  # 30 tokens are 8 pages: growth does not overshoot them
    rig.step(numbers(30, 1, 4))
    assert rig.group.pool.capacity == 9  # the expectation was wrong: it is no limit
    assert rig.group.nbytes == 9 * 4 * 2 * TOKEN_BYTES


def test_nothing_is_allocated_before_the_first_token_and_reset_gives_all_back() -> None:
    rig = Rig(SINKS)
    assert (rig.group.nbytes, rig.group.page_bytes) == (0, 0)
    rig.step(numbers(0, 1, 30))
    assert rig.group.page_bytes == 4 * 2 * TOKEN_BYTES
    rig.group.reset()
    assert (rig.group.nbytes, rig.group.seen, rig.group.pool.capacity, rig.group.rows) == (0, 0, 0, [])
    rig.step(numbers(100, 1, 3))
    assert rig.held(0) == {0: 100, 1: 101, 2: 102}


def test_what_a_recorded_step_needed_is_given_back_and_nothing_is_lost() -> None:
    rig = Rig(SINKS, layers=2)
    rig.step(numbers(0, 1, 8))
    full = rig.group.row_bound
    assert full == 1 + 2 + 1
    rig.group.recording = True
    rig.step(numbers(8, 1, 40))
    assert rig.group.pool.capacity > full
    assert spans(rig.held(0)) == [0, 1, *range(3, 48)]  # what query 8 saw, and all that was recorded
    rig.group.recording = False
    rig.step(numbers(48, 1, 1))
    assert rig.group.pool.capacity == full
    assert rig.group.nbytes == full * 4 * 2 * TOKEN_BYTES
    assert [rig.held(0, layer) for layer in range(2)] == [{t: t for t in [0, 1, *range(43, 49)]}] * 2
    assert violations(rig.group) == []


def test_a_trim_that_fails_leaves_every_layer_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 5):  # keys and values of two layers
        rig = Rig(SINKS, layers=2)
        rig.step(numbers(0, 1, 8))
        rig.group.recording = True
        rig.step(numbers(8, 1, 40))
        rig.group.recording = False
        allocations = [0]
        original = torch.Tensor.new_zeros

        def allocate(
            *args: object, count: list[int] = allocations, fails: int = number, **kwargs: object
        ) -> torch.Tensor:
            count[0] += 1
            if count[0] == fails:
                raise torch.OutOfMemoryError("no memory")
            return original(*args, **kwargs)  # type: ignore[arg-type]

        with mock.patch.object(torch.Tensor, "new_zeros", allocate):
            try:
                rig.step(numbers(48, 1, 1))
            except torch.OutOfMemoryError:
                rig.group.settle()
                rig.step(numbers(48, 1, 1))
        assert allocations[0] >= number
        assert [rig.held(0, layer) for layer in range(2)] == [{t: t for t in [0, 1, *range(43, 49)]}] * 2
        assert violations(rig.group) == []


# ---- steps that fit their pages, and steps that do not


def test_a_chunk_within_the_bound_is_written_in_place_and_a_longer_one_spills() -> None:
    rig = Rig(SINKS)  # 2 sinks + 6, pages of 4: a bound of 4 pages
    short = rig.step(numbers(0, 1, 16))[0]
    assert short.plan.in_place
    assert spans(rig.held(0)) == list(range(16))
    assert (short.plan.rows[0].before, len(short.plan.rows[0].after)) == ([], 1)
    long = rig.step(numbers(16, 1, 9))[0]  # tokens 11 to 24 and the sinks would be 5 pages
    assert not long.plan.in_place
    assert [(s.token, s.length) for s in long.plan.rows[0].before] == [(0, 2), (11, 5)]
    assert long.plan.rows[0].after == []
    assert spans(rig.held(0)) == [0, 1, *range(20, 25)]  # what the next query sees
    assert sum(write.length for write in long.plan.writes) == 5


def test_a_first_chunk_longer_than_the_window_keeps_sinks_and_the_end() -> None:
    rig = Rig(SINKS)
    view = rig.step(numbers(0, 1, 50))[0]
    assert not view.plan.in_place
    assert rig.held(0) == {t: t for t in [0, 1, *range(45, 50)]}
    assert rig.group.pool.used == 3


def test_one_token_steps_and_recorded_steps_are_always_in_place() -> None:
    rig = Rig(SinkWindow(window=2), page_size=1)
    rig.step(numbers(0, 1, 2))
    assert rig.step(numbers(2, 1, 1))[0].plan.in_place
    assert not rig.step(numbers(3, 1, 5))[0].plan.in_place
    rig.group.recording = True
    assert rig.step(numbers(8, 1, 5))[0].plan.in_place


def test_every_chunking_holds_the_same_in_the_end() -> None:
    expected = {t: t for t in [0, 1, *range(94, 99)]}
    for chunk in (1, 2, 5, 8, 33, 99):
        rig = Rig(SINKS)
        for start in range(0, 99, chunk):
            rig.step(numbers(start, 1, min(chunk, 99 - start)))
        rig.group._evict()  # between steps, up to a step's worth more may be held
        assert rig.held(0) == expected, chunk


def test_padding_is_never_stored_and_rows_keep_their_own_tokens() -> None:
    rig = Rig(SINKS, pads=[0, 5], fused=False)
    rig.step([[10, 11, 12], [90, 91, 92]])
    assert (rig.held(0), rig.held(1)) == ({0: 10, 1: 11, 2: 12}, {})
    rig.step([[13, 14, 15], [93, 94, 20]])
    assert rig.held(1) == {0: 20}
    assert rig.group.dense_length() == 6  # no row has lost a token: all columns seen
    for start in range(0, 40, 10):
        rig.step([list(range(100 + start, 110 + start)), list(range(200 + start, 210 + start))])
    assert spans(rig.held(0)) == [0, 1, *range(41, 46)]
    assert spans(rig.held(1)) == [0, 1, *range(36, 41)]
    assert rig.group.dense_length() == 7
    assert rig.layers[0].get_mask_sizes(3) == (10, 39)


def test_dense_columns_of_a_row_that_has_evicted_beside_one_that_has_not() -> None:
    rig = Rig(SinkWindow(sinks=2, window=6), pads=[0, 8], fused=False)
    rig.step([list(range(10)), [0] * 8 + [30, 31]])
    assert rig.group.dense_length() == 7  # 2 sinks + 5 that query 10 sees; the other row has 2 tokens
    keys, _ = rig.update(0, torch.tensor([[10], [32]]))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 5, 6, 7, 8, 9, 10]
    assert keys[1, 0, -3:, 0].tolist() == [30, 31, 32]


def test_a_batch_of_which_only_padding_was_fed() -> None:
    rig = Rig(KEEP_ALL, pads=[3, 2], fused=False)
    rig.step([[0], [0]])
    rig.step([[0], [0]])
    keys, _ = rig.update(0, torch.tensor([[0], [7]]))
    assert keys.shape == (2, 1, 3, 1)
    assert keys[1, 0, -1, 0] == 7


def test_the_eviction_check_runs_once_before_the_first_eviction_and_can_stop_it() -> None:
    calls: list[int] = []

    def before() -> None:
        calls.append(rig.group.seen)
        if len(calls) == 1:
            raise ValueError("not this model")

    rig = Rig(SINKS, before_eviction=before)
    rig.step(numbers(0, 1, 6))
    assert calls == []
    was = rig.picture()
    with pytest.raises(ValueError, match="not this model"):
        rig.step(numbers(6, 1, 3))  # query 8 cannot see token 2
    assert rig.picture() == was
    rig.step(numbers(6, 1, 2))  # query 7 sees all
    rig.step(numbers(8, 1, 1))
    rig.step(numbers(9, 1, 1))
    assert calls == [6, 8]


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
    assert (rig.group.held(), rig.group.dense_length()) == (0, 0)
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
    assert rig.group.nbytes == 12 * 2 * TOKEN_BYTES


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
    assert rig.group.nbytes == 16 * 2 * TOKEN_BYTES


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
