"""A layer group: the layers that keep the same tokens, and so share one page table.

All layers of a group see the same steps, one after the other. The first layer to arrive plans the step
(evicts, allocates, extends the rows); the others carry out the same plan on their own storage. Eviction
happens when a step begins, never when it ends: whatever the coming queries cannot see goes, so the last step
can always be taken back (`crop`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..errors import ConfigError, InterruptedStepError
from .budget import Budget
from .capacity import trim
from .plan import RowStep, StepPlan, StepRequest, Write
from .pool import PagePool
from .rows import Row, Stretch
from .storage import LayerStorage, unique_bytes

_ALL = 1 << 62  # past any logical page


class Retention(Protocol):
    """What a group asks of a policy (see `policies/sink_window.py`)."""

    @property
    def sinks(self) -> int:
        """First tokens that are never evicted."""

    @property
    def most_held(self) -> int | None:
        """Most non-sink tokens a query sees; `None` if unbounded."""

    @property
    def slides(self) -> bool:
        """Whether every query sees exactly its last `most_held` tokens besides the sinks."""

    def horizon(self, token: int) -> int:
        """Oldest non-sink token the query at `token` may see; never decreases."""


class LayerGroup:
    """Pages, table and storages of the layers that follow one policy.

    Args:
        layers: indices of the group's layers.
        policy: what to keep.
        page_size: tokens of a page.
        budget: limit shared with the cache's other groups.
        pads: left-padding columns per row; `None` means none.
        expected: tokens a row is expected to reach, so that growth does not overshoot it.
        before_eviction: called once, before the first token is evicted; raises if the model does not allow it.
    """

    def __init__(
        self,
        layers: Sequence[int],
        policy: Retention,
        page_size: int,
        budget: Budget,
        pads: Sequence[int] | None = None,
        expected: int | None = None,
        before_eviction: Callable[[], None] | None = None,
    ) -> None:
        self.layers, self.policy, self.page_size = tuple(layers), policy, page_size
        self.budget, self.pads, self.expected = budget, pads, expected
        self.before_eviction = before_eviction
        self.pool = PagePool()
        self.rows: list[Row] = []
        self.storages: dict[int, LayerStorage] = {}
        self.progress: dict[int, int] = dict.fromkeys(self.layers, 0)
        self.seen = 0
        self.evicted_pages = 0
        self.recording = False
        self.request: StepRequest | None = None  # what was admitted for the coming step (see `admission.py`)
        self.plan: StepPlan | None = None
        self._late = False  # a layer turned up that missed the first step: only a fresh start helps
        self._page_bytes_guess = 0

    # ---- sizes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers; layers that have not arrived count as the first one did."""
        known = sum(storage.page_bytes for storage in self.storages.values())
        return known + (len(self.layers) - len(self.storages)) * self._page_bytes_guess

    def expect_page_bytes(self, one_layer: int) -> bool:
        """Take the layers that have not arrived for as large as `one_layer`; returns whether they were so already."""
        known = self._page_bytes_guess in (one_layer, 0)
        self._page_bytes_guess = one_layer
        return known

    @property
    def nbytes(self) -> int:
        """Bytes of the storages really held."""
        return unique_bytes([t for s in self.storages.values() for t in (s.keys, s.values)])

    @property
    def row_bound(self) -> int | None:
        """Most pages a row needs between two one-token steps; `None` if unbounded.

        `ceil(sinks / page)` for the sinks, and `ceil((window - 1) / page) + 1` for a window at any alignment.
        """
        if self.policy.most_held is None:
            return None
        return -(-self.policy.sinks // self.page_size) - (1 - self.policy.most_held) // self.page_size + 1

    def held(self) -> int:
        """Tokens held, over all rows."""
        return sum(row.held(self.policy.sinks) for row in self.rows)

    def dense_length(self) -> int:
        """Columns the dense route presents before the next step's queries, right-aligned."""
        held = []
        for row in self.rows:
            lower = max(row.lower, self.policy.horizon(row.length))
            held.append(row.length if lower == 0 else min(self.policy.sinks, row.length) + row.length - lower)
        if all(count == row.length for count, row in zip(held, self.rows, strict=True)):
            return self.seen
        return max(held)

    # ---- one step

    def begins(self, layer: int) -> bool:
        """Whether the layer is the first of the group to arrive in a new step.

        Raises:
            InterruptedStepError: an earlier step stopped between two layers.
        """
        behind = [index for index, seen in self.progress.items() if 0 < seen < self.seen]
        if self.progress[layer] == self.seen and behind:
            raise InterruptedStepError(
                f"layers {behind} did not finish the last forward pass; call cache.settle() before the next one"
            )
        return self.progress[layer] == self.seen

    def step(self, layer: int, keys: Tensor, values: Tensor) -> StepPlan:
        """Begin the step that was admitted, or join it where another layer of the group has begun it.

        Args:
            layer: the layer that arrives.
            keys: new key states, `(batch, kv_heads, seq, key_dim)`.
            values: new value states, `(batch, kv_heads, seq, value_dim)`.

        Raises:
            InterruptedStepError: an earlier step stopped between two layers.
        """
        if self.progress[layer] == self.seen and self.request is not None:
            self.plan = self._begin(self.request)
        plan = self.plan
        if plan is None or self.progress[layer] != plan.seen or keys.shape[-2] != plan.queries:
            self._late = self._late or self.progress[layer] == 0
            raise InterruptedStepError(
                f"layer {layer} has seen {self.progress[layer]} tokens, its group {self.seen}: an earlier forward "
                "pass stopped between two layers; call cache.settle() before the next one"
            )
        if layer not in self.storages:
            try:
                self.storages[layer] = LayerStorage(keys, values, self.page_size, self.pool.capacity)
            except BaseException:
                self.settle()
                raise
        return plan

    def finish(self, layer: int) -> None:
        """The layer has stored its new tokens."""
        self.progress[layer] = self.seen
        if all(seen == self.seen for seen in self.progress.values()):
            self.plan = None

    def finish_all(self) -> None:
        """All layers have stored their new tokens."""
        self.progress = dict.fromkeys(self.layers, self.seen)
        self.plan = None

    def _begin(self, request: StepRequest) -> StepPlan:
        self.request, self.rows = None, request.rows
        plan = StepPlan(self.seen, request.queries, request.in_place, self.dense_length())
        self.before_eviction = None if request.evicting else self.before_eviction
        self._evict()
        # All drops come before all takes: what one row gives back another may need.
        keep = request.keep
        starts = [self._retire(row, first, plan.in_place) for row, first in zip(self.rows, keep, strict=True)]
        for index, (before, start, lower) in enumerate(starts):
            after = self._extend(plan, index, request.ends[index], keep[index])
            step = RowStep(self.rows[index].pad, start, request.ends[index], lower, before,
                           after if plan.in_place else [])  # fmt: skip
            plan.rows.append(step)
        self.seen += request.queries
        return plan

    def _evict(self) -> None:
        """Drop what no query from the next one on can see."""
        for row in self.rows:
            row.lower = max(row.lower, self.policy.horizon(row.length))
            if row.lower:
                self._drop_below(row, row.lower, row.length)
        trim(self)

    def wanted_pages(self, end: int, lower: int) -> tuple[range, range]:
        """Logical pages that hold the sinks, and those that hold the tokens `[lower, end)`."""
        size, sinks = self.page_size, -(-min(self.policy.sinks, end) // self.page_size)
        if lower >= end:
            return range(sinks), range(0)
        return range(min(sinks, lower // size)) if lower else range(0), range(lower // size, -(-end // size))

    def missing_pages(self, row: Row, end: int, lower: int) -> list[range]:
        """The wanted pages that the row does not have yet; they all come after those it has."""
        held = row.runs[-1].first + row.runs[-1].count if row.runs else 0
        return [range(max(held, pages.start), pages.stop) for pages in self.wanted_pages(end, lower)]

    def _drop_below(self, row: Row, lower: int, end: int) -> None:
        """Release the non-sink pages that hold nothing of `[lower, end)`."""
        first_free = -(-self.policy.sinks // self.page_size)
        gone = row.drop(first_free, lower // self.page_size if lower < end else _ALL)
        self.evicted_pages += len(gone)
        self.pool.release(gone)

    def _retire(self, row: Row, keep: int, in_place: bool) -> tuple[list[Stretch], int, int]:
        """Drop what will not outlive the step; returns what was held, the tokens seen and the lower bound."""
        before = [] if in_place else row.stretches(self.page_size, self.policy.sinks)
        if keep > row.lower:
            self._drop_below(row, keep, row.length)
        return before, row.length, row.lower

    def _extend(self, plan: StepPlan, index: int, end: int, keep: int) -> list[Stretch]:
        """Add the row's new pages and list its writes; returns all tokens held after the step."""
        row, start = self.rows[index], self.rows[index].length
        if end > start:
            self._own_tail(plan, row)
        missing = [page for pages in self.missing_pages(row, end, keep) for page in pages]
        if missing:
            last = row.runs[-1] if row.runs else None
            after = None if last is None else last.page + last.count - 1
            taken = self.pool.take(len(missing), after, leave_room=len(self.rows) > 1)
            for logical, page in zip(missing, taken, strict=True):
                row.add(logical, page)
        row.length, row.lower = end, keep
        held = row.stretches(self.page_size, self.policy.sinks)
        for piece in held:
            skip = max(0, start - piece.token)
            if skip < piece.length:
                column = piece.token + skip - end + plan.queries
                plan.writes.append(Write(index, column, piece.slot + skip, piece.length - skip))
        return held

    def _own_tail(self, plan: StepPlan, row: Row) -> None:
        """Copy-on-write: a partly filled last page that other rows hold too is copied before it is written."""
        logical = row.length // self.page_size
        page = row.page_of(logical)
        if page is not None and self.pool.references(page) > 1:
            target = self.pool.take(1, page)[0]
            plan.copies.append((page, target))
            self.pool.release([row.replace(logical, target)])

    # ---- changes between steps

    def check_crop(self, tokens: int) -> None:
        """Raise `ConfigError` if the last `tokens` columns cannot be taken back."""
        if not 0 <= tokens <= self.seen:
            raise ConfigError("tokens_to_remove", -tokens, f"0 to -{self.seen}, the tokens seen")
        seen = self.seen - tokens
        if seen and tokens and any(row.lower > self.policy.horizon(max(0, seen - row.pad)) for row in self.rows):
            allowed = "fewer: the shorter text needs tokens that were evicted; call activate_past_recording() before"
            raise ConfigError("tokens_to_remove", -tokens, allowed + " the forward pass that is to be taken back")

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` columns back.

        Raises:
            ConfigError: a token that the next query would see was evicted already.
        """
        self.check_crop(tokens)
        self._rewind(self.seen - tokens)

    def _rewind(self, seen: int) -> None:
        for row in self.rows:
            row.length = max(0, seen - row.pad)
            row.lower = row.lower if row.length else 0
            self.pool.release(row.drop(-(-row.length // self.page_size), _ALL))
            if row.lower:
                self._drop_below(row, row.lower, row.length)
        self._set_seen(seen)

    def select(self, rows: Sequence[int]) -> None:
        """Make row `rows[i]` the new row `i`: beams, repeats and selections. Pages are shared, not copied."""
        chosen = [self.rows[i].copy() for i in rows]
        for row in chosen:
            self.pool.share(page for _, page in row.pages())
        for row in self.rows:
            self.pool.release(page for _, page in row.pages())
        self.rows = chosen

    def skip(self, tokens: int) -> None:
        """Believe that `tokens` more tokens were seen and evicted (see `hf_ctxopt.testing.skip`)."""
        for row in self.rows:
            row.length += tokens
            row.lower = row.length
            self._drop_below(row, row.lower, row.length)
        self._set_seen(self.seen + tokens)

    def settle(self) -> int:
        """Take an unfinished step back, if there is one; returns the tokens seen.

        Raises:
            InterruptedStepError: the step had overwritten tokens that it would have to bring back.
        """
        plan, self.request = self.plan, None
        if self._late:
            self._rewind(0)
            self.select([])
        if plan is None or self._late or all(at in (0, self.seen) for at in self.progress.values()) and plan.seen:
            self._late = False
            return self.seen
        if plan.seen and not plan.in_place:
            raise InterruptedStepError(
                "the interrupted forward pass had evicted tokens of its own chunk; "
                "call cache.reset() and feed the text again"
            )
        for layer, at in self.progress.items():
            if at < self.seen and layer in self.storages:  # the table lists the copies, so every layer needs them
                self.storages[layer].copy_pages(plan.copies)
        self._rewind(plan.seen)
        if not plan.seen:
            self.select([])  # as before the first step: the next one may bring another batch
        return self.seen

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.pool, self.rows, self.storages = PagePool(), [], {}
        self.evicted_pages, self.pads = 0, None  # the padding was that of the text which is forgotten
        self.recording = self._late = False
        self._set_seen(0)

    def _set_seen(self, seen: int) -> None:
        self.seen, self.plan, self.request = seen, None, None
        self.progress = {layer: seen if at else 0 for layer, at in self.progress.items()}

    def holders(self) -> dict[int, int]:
        """Page → number of rows that list it, recomputed from the table."""
        return Counter(page for row in self.rows for _, page in row.pages())
