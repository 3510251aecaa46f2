"""One model layer's view of the pages, as transformers' cache contract wants it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import ConfigError, InterruptedStepError, UnsupportedModelError
from ..kernels.dispatch import decode_kernels
from ..kernels.rotate import RotaryFacts
from ..pages.admission import admit
from ..pages.carry_out import carry_out, prepare
from ..pages.group import LayerGroup
from ..pages.integrity import check
from ..pages.plan import StepPlan
from .arriving import fitting
from .context import CacheContext, NotReplayable, debugging
from .decode import DecodeState
from .dense import dense_states
from .handle import KVHandle
from .planned import decode_state
from .view import StepView


class PageLayer(CacheLayerMixin):
    """A layer whose keys and values live in the pages of a group.

    Changes of whole rows (beams, crops, resets) come once per layer from transformers and are carried out by the
    group's first layer.

    Args:
        group: the layer group.
        index: the layer's index in the model.
        context: shared by all layers of the cache.
        facts: how the model rotates this layer's keys; `None` if it does not, or nothing is evicted.
        is_sliding: whether the model itself gives this layer a sliding window.
        own_window: whether that window is all that is kept, so that the model's mask already tells what is visible.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(
        self, group: LayerGroup, index: int, context: CacheContext, facts: RotaryFacts | None,
        is_sliding: bool, own_window: bool = False,
    ) -> None:  # fmt: skip
        # Not the base class's __init__, whose tensors pages take the place of.
        self.is_initialized = False
        self.group, self.index, self.context = group, index, context
        if group not in context.groups:
            context.groups.append(group)
        self.facts, self.is_sliding, self.own_window = facts, is_sliding, own_window

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """Nothing to read or to write: `None` would let models that try go on and be wrong (see `models/readers.py`).

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"layer {self.index} keeps its states in pages; code that reads or changes layer.keys and layer.values of "
            "its cache needs one of transformers' own caches"
        )

    values = keys

    @property
    def _leads(self) -> bool:
        return self.index == self.group.layers[0]

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the tokens of coming steps can be taken back: nothing is ever evicted, or not at present."""
        evicts = self.group.policy.most_held is not None or self.group.evictor is not None
        return not evicts or self.group.recording

    @property
    def record_past(self) -> bool:
        """Whether the next steps must stay revocable (assisted decoding)."""
        return self.group.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.group.recording = value

    def activate_past_recording(self) -> None:
        """Keep every token of the coming steps until the step after them."""
        self.group.recording = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by the first `update`; there is nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store the step's states and return what attention reads.

        Args:
            key_states: `(batch, kv_heads, seq, key_dim)`, rotated.
            value_states: `(batch, kv_heads, seq, value_dim)`.

        Returns:
            Two `KVHandle` on the fused route, else two tensors `(batch, kv_heads, held + seq, head_dim)`.

        Raises:
            CacheFullError: the budget has no room.
            ConfigError: the states do not fit the pages (see `arriving.py`), or the batch is another one.
            UnsupportedModelError: tokens would have to be evicted and the model does not allow it.
            InterruptedStepError: an earlier forward pass stopped between two layers.
        """
        group = self.group
        key_states, value_states = fitting(key_states, value_states, group.storages.get(self.index), self.index)
        if self.context.planned:
            return self._planned(key_states, value_states)
        if group.begins(self.index):
            self.context.ledger.confirm(group.seen)
            if debugging():
                check(group, strict=True)
            admit(self.context.groups, group, key_states, value_states)
        plan = group.step(self.index, key_states, value_states)
        storage = group.storages[self.index]
        if "fused" not in plan.memo:
            plan.memo["fused"] = self.context.fused
        fused = plan.memo["fused"]
        decode = self._decode_state(plan, key_states) if fused else None
        whole = None
        if plan.single is not None and decode is None and self.facts is None and storage.codecs is None:
            whole = storage.append(key_states, value_states, plan.single)
            group.finish(self.index)
            if not fused:
                self._count("dense")
                return whole
        view = StepView(
            plan, storage, key_states, value_states, group.policy, self.context.ledger, self.facts,
            model_window=self.own_window, decode=decode, whole=whole,
            pass_over=self.context.pass_over if self._leads else None,
        )  # fmt: skip
        if whole is None:
            self._carry_out(view)
        self._count("fused" if fused else "dense")
        if fused:
            return KVHandle(view, self.context, values=False), KVHandle(view, self.context, values=True)
        return dense_states(view)

    def _count(self, route: str) -> None:
        """The layer has taken a step; the group's first layer counts it."""
        self.is_initialized = True
        if self._leads:
            self.context.steps[route] += 1

    def _carry_out(self, view: StepView) -> None:
        """Store the step's states as its plan says, or leave that to the kernels."""
        plan, group, storage = view.plan, self.group, view.storage
        if not plan.in_place:
            view.old = [[(stretch, *storage.read(stretch, copy=True)) for stretch in row.before] for row in plan.rows]
        if plan.fills:
            begun = group.keep_begun(plan, self.index)
            view.begun = {fill.row: begun[fill.sealed] for fill in plan.fills}
        if view.decode is None:
            view.stored = storage.turned(view.keys.detach(), view.values.detach())
            if plan.brief:
                storage.write(view.stored[0][0], view.stored[1][0], plan.writes[0].slot)
            else:
                carry_out(plan, self.index, storage, *view.stored)
            group.finish(self.index)
        else:  # the kernels write the new states when they attend, and only then has the layer done its part
            view.written, view.on_written = False, partial(group.finish, self.index)
            prepare(plan, self.index, storage)

    def _planned(self, keys: Tensor, values: Tensor) -> tuple[KVHandle, KVHandle]:
        """Handles on a step that was planned, and is finished, by somebody else (see `planned.py`)."""
        group, context = self.group, self.context
        plan = group.plan
        if plan is None:
            raise NotReplayable("a layer stored twice in one step")
        storage = group.storages[self.index]
        view = StepView(
            plan, storage, keys, values, group.policy, context.ledger, self.facts, model_window=self.own_window,
            decode=decode_state(context, group, plan, storage), written=False, planned=True,
            trusted=context.trusted,
        )  # fmt: skip
        return KVHandle(view, context, values=False), KVHandle(view, context, values=True)

    def _decode_state(self, plan: StepPlan, keys: Tensor) -> DecodeState | None:
        """The state that kernels read this one-token step from; `None` where plain torch reads the pages."""
        if plan.queries > 1 or not plan.in_place or decode_kernels(keys.device) is None:
            return None
        if torch.is_grad_enabled() and keys.requires_grad:
            self.context.pass_over("gradients are on")
            return None
        try:
            return decode_state(self.context, self.group, plan, self.group.storages[self.index])
        except NotReplayable as reason:
            self.context.pass_over(str(reason))
            return None

    def get_seq_length(self) -> int:
        """Columns of text seen, left padding included."""
        return self.group.progress[self.index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(held + query_length, seen - held)`: the columns the dense route presents and the first one's label."""
        plan = self.group.plan
        if plan is not None and self.group.progress[self.index] == plan.seen:  # planned, and not run yet
            return plan.dense_before + query_length, plan.seen - plan.dense_before
        held = self.group.dense_length(query_length) if self.group.rows else 0
        return held + query_length, self.group.seen - held

    def get_max_length(self) -> int:
        """-1: any number of tokens may be seen."""
        return -1

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.is_initialized = False
        if self._leads:
            self.group.reset()
            self.context.ledger.crop(0)
            self.context.forget_graph()
            self.context.decoders.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back.

        Raises:
            ConfigError: a positive number, or a token the shorter text needs was evicted.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ConfigError("tokens_to_remove", tokens_to_remove, "0 or a negative number of tokens")
        if self._leads and tokens_to_remove:
            self.group.crop(-tokens_to_remove)
            self.context.ledger.crop(self.group.seen)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row `i` becomes a copy of row `beam_idx[i]`; pages are shared until one of them is written."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side.

        Raises:
            InterruptedStepError: an earlier forward pass stopped between two layers.
        """
        self._require_whole()
        if self._leads and self.group.rows:
            self.group.select([row for row in range(len(self.group.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the named rows, in that order.

        Raises:
            InterruptedStepError: an earlier forward pass stopped between two layers.
        """
        self._require_whole()
        if self._leads and self.group.rows:
            rows = torch.arange(len(self.group.rows))[indices.cpu()]
            self.group.select(rows.tolist())

    def _require_whole(self) -> None:
        if not self.context.between_steps:
            raise InterruptedStepError(
                "an earlier forward pass stopped between two layers; call cache.settle() before its rows are changed"
            )

    def offload(self) -> None:
        """Pages stay where they are; transformers' own offloading is not used by these caches."""

    def prefetch(self) -> None:
        """See `offload`."""
