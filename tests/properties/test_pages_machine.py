"""State machines over the page accounts: random programs of steps, forks, crops and failures against an oracle.

The oracle of a row is the list of its tokens' numbers, `None` where a token is gone for good; what a query must see
follows from the policy alone. After every rule the pages are read back and the accounts are counted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_ctxopt.caches.dense import dense_states
from hf_ctxopt.errors import CacheFullError, ConfigError, InterruptedStepError
from hf_ctxopt.pages.plan import StepPlan
from hf_ctxopt.pages.pool import PagePool
from hf_ctxopt.pages.requantize import requantize
from hf_ctxopt.pages.sealed import Codecs
from hf_ctxopt.pages.storage import LayerStorage
from hf_ctxopt.policies.sink_window import SinkWindow
from tests.pages.rig import LAYER, Rig, exact, numbers

POLICIES = [
    SinkWindow(),
    SinkWindow(window=1),
    SinkWindow(window=6),
    SinkWindow(sinks=2, window=3),
    SinkWindow(sinks=5, window=16),
    SinkWindow(sinks=1, window=8, n_discard=0),
    SinkWindow(sinks=3, window=9, n_discard=2),
    SinkWindow(sinks=0, window=4, n_discard=99),
]
LAYERS = 2
MOST_ROWS = 4
SETTINGS = settings(
    max_examples=200, stateful_step_count=50, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class OutOfMemory(RuntimeError):
    """What the failing allocations raise."""


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which hypothesis would take for its own."""


@contextmanager
def failing_allocation(number: int) -> Iterator[list[int]]:
    """The `number`-th allocation of storage or growth of the pool raises; yields a list that then has an entry."""
    count, raised = [0], []

    def counted(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                raised.append(number)
                raise OutOfMemory(f"allocation {number}")
            return original(*args, **kwargs)

        return allocate

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "new_zeros", counted(torch.Tensor.new_zeros)))
        stack.enter_context(mock.patch.object(PagePool, "resize", counted(PagePool.resize)))
        yield raised


def seen_by(policy: SinkWindow, history: list[int | None], token: int) -> dict[int, int]:
    """Token → number: what the query at `token` sees of the tokens up to itself, by the policy's definition."""
    first = policy.horizon(token)
    return {
        index: number
        for index, number in enumerate(history[: token + 1])
        if number is not None and (index < policy.sinks or index >= first)
    }


class GroupMachine(RuleBasedStateMachine):
    """A layer group under everything that generate, beams, assisted decoding and failures do to it."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        page_size=st.integers(1, 8),
        pads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
        expected=st.sampled_from([None, 40]),
        codecs=st.sampled_from([None, exact(), exact(open_first=1)]),
    )
    def start(
        self, policy: SinkWindow, page_size: int, pads: list[int], expected: int | None, codecs: Codecs | None
    ) -> None:
        self.rig = Rig(policy, page_size, LAYERS, pads=pads, expected=expected, codecs=codecs)
        self.group, self.policy, self.pads = self.rig.group, policy, pads
        self.next_number = 1
        self.forget()

    def forget(self) -> None:
        self.columns = 0
        self.rows = [(pad, list[int | None]()) for pad in self.pads]
        self.revocable = 0  # columns that crop() promises to take back
        self.recorded = False  # the last step was kept whole, whatever its length

    # ---- rules

    @rule(queries=st.one_of(st.just(1), st.integers(1, 5), st.integers(1, 70)))
    def step(self, queries: int) -> None:
        ids = self.new_numbers(queries)
        views = self.rig.step(ids)
        self.record(ids)
        for layer, view in enumerate(views):
            self.check_reads(view, layer, queries)

    @rule(queries=st.integers(1, 70), number=st.integers(1, 6))
    def step_without_memory(self, queries: int, number: int) -> None:
        ids, before = self.new_numbers(queries), self.group.seen
        with failing_allocation(number) as raised:
            try:
                self.rig.step(ids)
            except OutOfMemory:
                self.group.settle()
                assert raised
                assert self.group.seen == before
                self.revocable = 0  # the failed step may have evicted what it could not see
                return
        assert not raised
        self.record(ids)

    @rule(queries=st.one_of(st.just(1), st.integers(1, 70)), pages=st.integers(0, 8))
    def step_within_budget(self, queries: int, pages: int) -> None:
        ids, before, size = self.new_numbers(queries), self.rig.picture(), self.group.page_size
        budget = self.group.budget
        budget.tokens = (sum(self.group.arena.used) + pages) * size
        try:
            self.rig.step(ids)
        except CacheFullError as error:
            assert error.needed > error.room == budget.tokens
            assert self.rig.picture() == before, "a refused step changed something"
            budget.tokens = None
            self.rig.step(ids)
            used = sum(self.group.arena.used) * size
            if self.group.codecs is None:
                assert used == error.needed, "a step was refused that needed less than it said"
            # Open pages that the step itself seals are there until it has done so.
            assert used <= error.needed
        finally:
            budget.tokens = None
        self.record(ids)

    @rule(
        queries=st.one_of(st.just(1), st.integers(1, 70)),
        layer=st.integers(0, LAYERS - 1),
        method=st.sampled_from(["copy_pages", "write", "append", "seal", "fill", None]),
        retry=st.booleans(),
        settle=st.booleans(),
    )
    def interrupted_step(self, queries: int, layer: int, method: str | None, retry: bool, settle: bool) -> None:
        """Stops inside layer `layer`, or between it and the next; `retry` goes on without settling first."""
        ids = self.new_numbers(queries)
        spills = self.policy.window is not None and queries > 1 and not self.group.recording and self.columns > 0
        for index in range(layer):
            self.rig.update(index, ids)
        if method is None:
            self.rig.update(layer, ids)
            if layer == LAYERS - 1:
                self.record(ids)
                return
        else:
            plans, step = list[StepPlan](), self.group.step

            def planned(*args: Any) -> StepPlan:
                plans.append(step(*args))
                return plans[-1]

            with mock.patch.object(LayerStorage, method, side_effect=Interrupt), \
                    mock.patch.object(self.group, "step", planned):  # fmt: skip
                try:
                    self.rig.update(layer, ids)
                except Interrupt:
                    assert method in self.calls(plans[-1])
                else:
                    assert method not in self.calls(plans[-1])
                    if layer == LAYERS - 1:
                        self.record(ids)
                        return
        if retry and self.group.plan is not None and self.group.progress[0] == self.group.seen:
            with pytest.raises(InterruptedStepError):
                self.rig.step(ids)
        if not settle:
            self.reset()
            return
        try:
            assert self.group.settle() == self.columns
            self.revocable = 0
        except InterruptedStepError:
            assert spills, "a step that could be taken back was not"
            self.reset()

    def calls(self, plan: StepPlan) -> set[str]:
        """The methods of its storage that a layer calls to carry out a plan."""
        if plan.brief:
            return {"append" if plan.single is not None and self.group.codecs is None else "write"}
        listed = {"fill": plan.fills, "write": plan.writes}
        return {"seal", "copy_pages"} | {method for method, parts in listed.items() if parts}

    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=MOST_ROWS))
    def select(self, picks: list[int]) -> None:
        if self.columns:
            chosen = [pick % len(self.rows) for pick in picks]
            self.rig.layers[0].batch_select_indices(torch.tensor(chosen))
            self.take_rows(chosen)

    @rule(shift=st.integers(0, 3))
    def reorder(self, shift: int) -> None:
        if self.columns:
            chosen = [(index * shift) % len(self.rows) for index in range(len(self.rows))]
            self.rig.layers[0].reorder_cache(torch.tensor(chosen))
            self.take_rows(chosen)

    @precondition(lambda self: len(self.rows) * 2 <= MOST_ROWS)
    @rule()
    def repeat(self) -> None:
        if self.columns:
            self.rig.layers[0].batch_repeat_interleave(2)
            self.take_rows([index // 2 for index in range(2 * len(self.rows))])

    @rule(columns=st.one_of(st.integers(0, 4), st.integers(0, 90)))
    def crop(self, columns: int) -> None:
        before = self.rig.picture()
        try:
            self.rig.layers[0].crop(-columns)
        except ConfigError as error:
            assert error.field == "tokens_to_remove"
            assert columns > self.columns or (self.policy.window is not None and columns > self.revocable)
            assert self.rig.picture() == before
            return
        assert columns <= self.columns
        self.columns -= columns
        self.revocable = max(0, self.revocable - columns)
        self.rows = [(pad, history[: max(0, self.columns - pad)]) for pad, history in self.rows]

    @rule(on=st.booleans())
    def record_past(self, on: bool) -> None:
        if on:
            self.rig.layers[1].activate_past_recording()
        else:
            self.rig.layers[1].record_past = False

    @precondition(lambda self: self.group.codecs is None and self.group.plan is None)
    @rule(first=st.integers(0, 1), number=st.integers(0, 5))
    def close_full_pages(self, first: int, number: int) -> None:
        """Full pages become sealed ones while the text is in use; memory may run out (at 0 it does not)."""
        before = self.rig.picture()
        with failing_allocation(number) as raised:
            try:
                requantize(self.group, exact(open_first=first))
            except OutOfMemory:
                assert raised
                assert self.rig.picture() == before
                return
        assert self.rig.picture()[:2] == before[:2]
        assert self.rig.picture()[3] == before[3], "tokens changed"
        size = self.group.page_size
        for row in self.group.rows if self.columns else []:
            assert not row.open_pages(first, row.length // size), "a full page stayed open"

    @rule(tokens=st.integers(1, 1000))
    def skip(self, tokens: int) -> None:
        full = all(len(history) >= max(1, self.policy.sinks) for _, history in self.rows)
        if self.policy.window is None or not self.columns or not full:
            return
        self.group.skip(tokens)
        self.columns += tokens
        gone = self.policy.sinks
        self.rows = [(pad, [*history[:gone], *[None] * (len(history) - gone + tokens)]) for pad, history in self.rows]
        self.revocable = 0

    @rule()
    def reset(self) -> None:
        for layer in self.rig.layers:
            layer.reset()
        assert self.group.arena.nbytes == 0
        self.pads = [0] * len(self.pads)  # the padding was that of the text which is forgotten
        self.forget()

    # ---- the oracle's own moves

    def new_numbers(self, queries: int) -> torch.Tensor:
        ids = numbers(self.next_number, len(self.rows), queries)
        self.next_number += ids.numel()
        assert self.next_number < LAYER
        return ids

    def record(self, ids: torch.Tensor) -> None:
        """The step's tokens were stored; those in padding columns do not exist."""
        fresh = any(None in history[self.policy.sinks :] for _, history in self.rows)  # a skip is not taken back
        for (pad, history), new in zip(self.rows, ids.tolist(), strict=True):
            history.extend(new[max(0, min(len(new), pad - self.columns)) :])
        self.columns += ids.shape[1]
        self.recorded = self.group.recording
        self.revocable = ids.shape[1] if (ids.shape[1] == 1 or self.recorded) and not fresh else 0

    def take_rows(self, chosen: list[int]) -> None:
        self.rows = [(self.rows[index][0], list(self.rows[index][1])) for index in chosen]

    # ---- what must hold

    def check_reads(self, view: Any, layer: int, queries: int) -> None:
        """What the step's own queries read, on both routes: with equal scores, attention is the mean of the values."""
        device_query = torch.zeros(len(self.rows), 1, queries, 1)
        mean = view.attend(device_query, None, 1.0, None, None)
        dense_keys, _ = dense_states(view)
        for index, (_, history) in enumerate(self.rows):
            first = len(history) - min(queries, len(history))
            for token in range(max(first, len(history) - 3), len(history)):  # the last three tell as much as all
                expected = list(seen_by(self.policy, history, token).values())
                column = queries - (len(history) - token)
                found = mean[index, 0, column, 1].item() / 2 - LAYER * layer
                assert abs(found - sum(expected) / len(expected)) < 0.51, (index, token)
            old = seen_by(self.policy, history, first) if first < len(history) else {}
            shown = [number for token, number in old.items() if token < first] + history[first:]
            columns = (dense_keys[index, 0, :, 0] - LAYER * layer).tolist()
            assert columns[len(columns) - len(shown) :] == shown, index

    @invariant()
    def accounts_are_right(self) -> None:
        assert self.rig.account_errors() == []
        assert self.group.seen == self.columns
        for storage in self.group.storages.values():
            assert min(part.shape[1] for part in (storage.keys, storage.values)) >= self.group.pool.capacity
            sealed = [tensor.shape[1] for part in storage.parts for tensor in part.tensors]
            assert all(capacity >= self.group.sealed.capacity for capacity in sealed)

    @invariant()
    def pages_hold_what_the_next_query_sees(self) -> None:
        for index, (_, history) in enumerate(self.rows if self.columns else []):
            visible = seen_by(self.policy, [*history, None], len(history))
            for layer in self.group.storages:
                held = self.rig.held(index, layer)
                assert visible.items() <= held.items(), (index, layer)
                assert all(history[token] == number for token, number in held.items()), (index, layer)

    @invariant()
    def memory_is_bounded(self) -> None:
        """After a step that was not recorded, a row holds at most its bound."""
        bound = self.group.row_bound
        if bound is not None and not self.recorded:
            assert all(sum(1 for _ in row.pages()) <= bound for row in self.group.rows)

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for row in self.group.rows:
            self.group.release(page for _, page in row.pages())
        assert self.group.arena.used == (0, 0), "pages leaked"


GroupMachine.TestCase.settings = SETTINGS
TestGroupMachine = GroupMachine.TestCase
