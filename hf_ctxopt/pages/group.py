"""A layer group: the layers that keep the same tokens, and so share one page table.

All layers of a group see the same steps, one after the other. The first layer to arrive plans the step
(evicts, allocates, extends the rows); the others carry out the same plan on their own storage. Eviction
happens when a step begins, never when it ends: whatever the coming queries cannot see goes, so the last step
can always be taken back (`crop`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError, InterruptedStepError
from .arena import Arena, Table
from .begin import begin
from .budget import Budget
from .carry_out import begun_tokens, take_back
from .holes import leaving
from .plan import StepPlan, StepRequest
from .policy import Evictor, Policy
from .pool import PagePool
from .rewind import rewind
from .rows import END, Row
from .sealed import Codecs
from .storage import LayerStorage


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
        codecs: how full pages are stored; `None` leaves all pages open.
        arena: the pages, where other groups list them too; `None` for an arena of its own.

    Attributes:
        recording: steps must stay revocable: nothing is evicted or sealed that a step may have to bring back.
        evictor: names pages to drop when a budget is full; `None` where the policy's window says it all.
        dropped: whether it named any for the step that was begun last: taking that back does not bring them back.
        keeping: all pages of a step stay until the next one begins, whatever the window.
        guarded: copies of what a step encodes of begun pages stay until the next one begins, so that taking the step
            back loses nothing even where it has gone through every layer.
        begun: those copies, by layer and sealed page, K and V `(kv_heads, tokens, head_dim)`; otherwise they are
            there for as long as the step takes.
        headroom: least number of sealed pages that growth adds at once; larger for whoever must not see it often.
    """

    def __init__(
        self,
        layers: Sequence[int],
        policy: Policy,
        page_size: int,
        budget: Budget,
        pads: Sequence[int] | None = None,
        expected: int | None = None,
        before_eviction: Callable[[], None] | None = None,
        codecs: Codecs | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.layers, self.policy, self.page_size = tuple(layers), policy, page_size
        self.budget, self.pads, self.expected = budget, pads, expected
        self.announced = 0  # tokens a row is certain to reach: those of a prompt that is fed in chunks
        self.before_eviction = before_eviction
        self.codecs = codecs
        self.arena = Arena(self.layers, page_size, codecs) if arena is None else arena
        self.table = Table()
        self._enter()
        self.headroom = 0
        self.progress: dict[int, int] = dict.fromkeys(self.layers, 0)
        self.seen = 0
        self.recording = self.keeping = self.guarded = False
        self.begun: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self.evictor: Evictor | None = None
        self.dropped = False
        self.request: StepRequest | None = None  # what was admitted for the coming step (see `admission.py`)
        self.plan: StepPlan | None = None
        self._late = False  # a layer turned up that missed the first step: only a fresh start helps

    def _enter(self) -> None:
        """List this group's pages with the arena, for as long as the group lives."""
        self.arena.listings.append(self.table)
        if self.arena.shared:
            weakref.finalize(self, self.arena.leave, self.table)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGroup:
        """A copy whose rows list the same pages where the arena is shared, and copies of them where it is not."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        if twin.arena is self.arena:
            self.arena.share(self.table.listed())
            twin._enter()
        return twin

    @property
    def rows(self) -> list[Row]:
        """The sequences of the batch."""
        return self.table.rows

    @rows.setter
    def rows(self, rows: list[Row]) -> None:
        self.table.rows = rows

    @property
    def pool(self) -> PagePool:
        """Open pages."""
        return self.arena.pool

    @property
    def sealed(self) -> PagePool:
        """Sealed pages."""
        return self.arena.sealed

    @property
    def storages(self) -> dict[int, LayerStorage]:
        """Layer → its keys and values."""
        return self.arena.storages

    # ---- sizes

    @property
    def row_bound(self) -> int | None:
        """Most pages a row needs between two one-token steps; `None` if unbounded.

        `ceil(sinks / page)` for the sinks, and `ceil((window - 1) / page) + 1` for a window at any alignment.
        """
        if self.evictor is not None:
            return None if self.evictor.tokens is None else -(-self.evictor.tokens // self.page_size)
        if self.policy.most_held is None:
            return None
        return -(-self.policy.sinks // self.page_size) - (1 - self.policy.most_held) // self.page_size + 1

    def held(self) -> int:
        """Tokens held, over all rows."""
        return sum(row.held(self.policy.sinks, self.page_size) for row in self.rows)

    def dense_length(self, queries: int) -> int:
        """Columns the dense route presents before the next step's `queries`, right-aligned."""
        held = []
        for row in self.rows:
            lower = max(row.lower, self.policy.horizon(row.length))
            count = row.length if lower == 0 else min(self.policy.sinks, row.length) + row.length - lower
            coming = max(0, self.seen + queries - row.pad) - row.length
            held.append(count - (len(row.holes) + leaving(self, row, coming)) * self.page_size)
        if all(count == row.length for count, row in zip(held, self.rows, strict=True)):
            return self.seen
        return max(held)

    # ---- one step

    def begins(self, layer: int) -> bool:
        """Whether the layer is the first of the group to arrive in a new step.

        Raises:
            InterruptedStepError: an earlier step stopped between two layers.
        """
        if self.progress[layer] != self.seen:
            return False
        behind = [index for index, seen in self.progress.items() if 0 < seen < self.seen]
        if behind:
            raise InterruptedStepError(
                f"layers {behind} did not finish the last forward pass; call cache.settle() before the next one"
            )
        return True

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
            self.begun = {}
            self.plan = begin(self, self.request)
        plan = self.plan
        if plan is None or self.progress[layer] != plan.seen or keys.shape[-2] != plan.queries:
            self._late = self._late or self.progress[layer] == 0
            raise InterruptedStepError(
                f"layer {layer} has seen {self.progress[layer]} tokens, its group {self.seen}: an earlier forward "
                "pass stopped between two layers; call cache.settle() before the next one"
            )
        if layer not in self.storages:
            try:
                self.storages[layer] = LayerStorage(
                    keys, values, self.page_size, self.pool.capacity, self.codecs, self.sealed.capacity
                )
                self.arena.storage_version += 1
            except BaseException:
                self.settle()
                raise
        return plan

    def keep_begun(self, plan: StepPlan, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies of what the layer's begun pages hold before the step encodes them, by sealed page; made once."""
        kept = self.begun.setdefault(layer, {})
        if not kept and layer not in plan.encoded:
            kept.update((fill.sealed, begun_tokens(fill, self.storages[layer])) for fill in plan.fills)
        return kept

    def finish(self, layer: int) -> None:
        """The layer has stored its new tokens."""
        self.progress[layer] = self.seen
        # Layers mostly come in order: only the last one is worth asking about all the others.
        if self.progress[self.layers[-1]] == self.seen and all(seen == self.seen for seen in self.progress.values()):
            self._end_step()

    def finish_all(self) -> None:
        """All layers have stored their new tokens."""
        self.progress = dict.fromkeys(self.layers, self.seen)
        self._end_step()

    def _end_step(self) -> None:
        self.plan = None
        if not self.guarded:
            self.begun = {}

    def drop_below(self, row: Row, lower: int, end: int) -> None:
        """Release the non-sink pages that hold nothing of `[lower, end)`."""
        first_free = -(-self.policy.sinks // self.page_size)
        self.release(row.drop(first_free, lower // self.page_size if lower < end else END))

    def replace(self, row: Row, logical: int, page: int) -> None:
        """Put `page` in the place of the page that the row holds, and release that one."""
        self.release([row.replace(logical, page)])

    def release(self, pages: Iterable[int]) -> None:
        """A row holds these pages no more."""
        self.arena.release(pages)

    # ---- changes between steps

    def check_crop(self, tokens: int) -> None:
        """Raise `ConfigError` if the last `tokens` columns cannot be taken back."""
        if not 0 <= tokens <= self.seen:
            raise ConfigError("tokens_to_remove", -tokens, f"0 to -{self.seen}, the tokens seen")
        seen = self.seen - tokens
        if seen and tokens and any(self._misses(row, max(0, seen - row.pad)) for row in self.rows):
            allowed = "fewer: the shorter text needs tokens that were evicted; call activate_past_recording() before"
            raise ConfigError("tokens_to_remove", -tokens, allowed + " the forward pass that is to be taken back")

    def _misses(self, row: Row, length: int) -> bool:
        """Whether the row, shortened to `length` tokens, would need some that were evicted since it was that long."""
        return row.lower > self.policy.horizon(length) or any(at > length for at in row.holes.values())

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` columns back.

        Raises:
            ConfigError: a token that the next query would see was evicted already.
        """
        self.check_crop(tokens)
        rewind(self, self.seen - tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Make row `rows[i]` the new row `i`: beams, repeats and selections. Pages are shared, not copied."""
        chosen = [self.rows[i].copy() for i in rows]
        for row in chosen:
            self.arena.share(page for _, page in row.pages())
        for row in self.rows:
            self.release(page for _, page in row.pages())
        self.rows = chosen

    def skip(self, tokens: int) -> None:
        """Believe that `tokens` more tokens were seen and evicted (see `hf_ctxopt.testing.skip`)."""
        for row in self.rows:
            row.length += tokens
            row.lower = row.length
            self.drop_below(row, row.lower, row.length)
        self.set_seen(self.seen + tokens)

    def settle(self) -> int:
        """Take an unfinished step back, if there is one; returns the tokens seen.

        Raises:
            InterruptedStepError: the step had overwritten tokens that it would have to bring back.
        """
        plan, self.request = self.plan, None
        if self._late:
            rewind(self, 0)
            self._forget_rows()
        if plan is None or self._late or all(at in (0, self.seen) for at in self.progress.values()) and plan.seen:
            self._late = False
            return self.seen
        if plan.seen and not plan.in_place:
            raise InterruptedStepError(
                "the interrupted forward pass had evicted tokens of its own chunk; "
                "call cache.reset() and feed the text again"
            )
        for layer, at in self.progress.items():
            if at < self.seen and layer in self.storages:  # the table lists these pages, so every layer needs them
                self.keep_begun(plan, layer)
                take_back(plan, layer, self.storages[layer])
        rewind(self, plan.seen)
        if not plan.seen:
            self._forget_rows()
        return self.seen

    def _forget_rows(self) -> None:
        """As before the first step: where no padding is given, the next one may bring another batch."""
        self.pads = [row.pad for row in self.rows] if self.pads is not None else None
        self.select([])

    def reset(self) -> None:
        """Forget everything and give the memory back, or, where others list pages too, this group's pages."""
        if self.arena.shared:
            self.release(list(self.table.listed()))
        else:
            self.arena.clear()
        self.rows = []
        self.pads = None  # the padding was that of the text which is forgotten
        self.recording = self._late = self.dropped = False
        self.announced = 0
        self.set_seen(0)

    def set_seen(self, seen: int) -> None:
        """The group has so many columns, and no step is under way."""
        self.seen, self.plan, self.request, self.begun = seen, None, None, {}
        self.progress = {layer: seen if at else 0 for layer, at in self.progress.items()}
