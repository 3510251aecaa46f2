"""Layer groups: what one step does to pages, table and storages, with exact expectations.

Random programs of the same moves are in `tests/properties/test_pages_machine.py`.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from hf_ctxopt.pages.begin import evict
from hf_ctxopt.pages.integrity import violations
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import LAYER, TOKEN_BYTES, Rig, exact, numbers, spans

KEEP_ALL = SinkWindow()
SINKS = SinkWindow(sinks=2, window=6)


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
            sizes.add(rig.group.arena.nbytes)
    for start in (120, 121):
        rig.step(numbers(start * rows, rows, 1))
        sizes.add(rig.group.arena.nbytes)
    pages = rows * (-(-sinks // page) + -(-(window - 1) // page) + 1)
    assert sizes == {pages * page * 2 * TOKEN_BYTES}


def test_bytes_of_a_cache_that_keeps_everything_follow_what_is_expected() -> None:
    rig = Rig(KEEP_ALL, page_size=4, layers=2, expected=30)
    rig.step(numbers(0, 1, 25))
    for start in range(25, 30):
        rig.step(numbers(start, 1, 1))
    assert rig.group.pool.capacity == 8  # 30 tokens are 8 pages: growth does not overshoot them
    rig.step(numbers(30, 1, 4))
    assert rig.group.pool.capacity == 11  # the expectation was wrong: growth is as if there were none
    assert rig.group.arena.nbytes == 11 * 4 * 2 * TOKEN_BYTES


def test_nothing_is_allocated_before_the_first_token_and_reset_gives_all_back() -> None:
    rig = Rig(SINKS)
    assert (rig.group.arena.nbytes, rig.group.arena.page_bytes) == (0, 0)
    rig.step(numbers(0, 1, 30))
    assert rig.group.arena.page_bytes == 4 * 2 * TOKEN_BYTES
    rig.group.reset()
    assert (rig.group.arena.nbytes, rig.group.seen, rig.group.pool.capacity, rig.group.rows) == (0, 0, 0, [])
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
    assert rig.group.arena.nbytes == full * 4 * 2 * TOKEN_BYTES
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
        evict(rig.group)  # between steps, up to a step's worth more may be held
        assert rig.held(0) == expected, chunk


def test_padding_is_never_stored_and_rows_keep_their_own_tokens() -> None:
    rig = Rig(SINKS, pads=[0, 5], fused=False)
    rig.step([[10, 11, 12], [90, 91, 92]])
    assert (rig.held(0), rig.held(1)) == ({0: 10, 1: 11, 2: 12}, {})
    rig.step([[13, 14, 15], [93, 94, 20]])
    assert rig.held(1) == {0: 20}
    assert rig.group.dense_length(1) == 6  # no row has lost a token: all columns seen
    for start in range(0, 40, 10):
        rig.step([list(range(100 + start, 110 + start)), list(range(200 + start, 210 + start))])
    assert spans(rig.held(0)) == [0, 1, *range(41, 46)]
    assert spans(rig.held(1)) == [0, 1, *range(36, 41)]
    assert rig.group.dense_length(1) == 7
    assert rig.layers[0].get_mask_sizes(3) == (10, 39)


def test_dense_columns_of_a_row_that_has_evicted_beside_one_that_has_not() -> None:
    rig = Rig(SinkWindow(sinks=2, window=6), pads=[0, 8], fused=False)
    rig.step([list(range(10)), [0] * 8 + [30, 31]])
    assert rig.group.dense_length(1) == 7  # 2 sinks + 5 that query 10 sees; the other row has 2 tokens
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


# ---- one stretch


def test_a_token_behind_one_stretch_is_written_and_read_in_one_go() -> None:
    rig = Rig(KEEP_ALL, layers=2)
    rig.step(numbers(0, 1, 6))
    views = rig.step(numbers(6, 1, 1))
    plan = views[0].plan
    assert plan.single == plan.rows[0].after[0]
    for layer, view in enumerate(views):
        assert view.whole is not None
        assert view.whole[0].flatten().tolist() == [token + LAYER * layer for token in range(7)]
        assert rig.held(0, layer) == {token: token for token in range(7)}
    assert rig.group.plan is None  # all layers have finished


@pytest.mark.parametrize(
    ("options", "rows", "queries", "brief"),
    [
        ({}, 1, 2, False),
        ({}, 2, 1, False),
        ({"pads": [2]}, 1, 1, True),  # the dense route shows padding columns
        ({"codecs": exact()}, 1, 1, True),  # sealed pages before the open one
    ],
    ids=["more_tokens", "more_rows", "padding", "sealed"],
)
def test_steps_that_are_more_than_that_take_the_general_way(
    options: dict[str, Any], rows: int, queries: int, brief: bool
) -> None:
    rig = Rig(KEEP_ALL, layers=2, **options)
    rig.step(numbers(0, rows, 6))
    views = rig.step(numbers(6 * rows, rows, queries))
    assert views[0].plan.single is None
    assert views[0].plan.brief is brief
    assert all(view.whole is None for view in views)
