"""The dense route: K and V of a step as stock attention wants them, and where their columns come from.

Where they come from is worked out once per step and group, and shared by the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.rotate import RotaryFacts, rotation, turn
from ..pages.rows import Stretch

if TYPE_CHECKING:
    from .view import StepView


@dataclass
class DenseLayout:
    """Where dense columns come from; made once per step and group.

    Args:
        single: the one stretch that is all of it (batch 1, neighbouring pages): read as a view.
        slots: `(batch, columns)` pool slots; padding columns read slot 0, which every mask hides.
        rows: each row's stretches.
        delta: `(batch, stop - start)` positions to turn the keys of columns `[start, stop)` by.
        rotations: the rotations by `delta`, one for each set of frequencies.
    """

    single: Stretch | None
    slots: Tensor
    rows: list[list[Stretch]]
    delta: Tensor
    start: int
    stop: int
    rotations: dict[Callable[[], Tensor], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, view: StepView) -> DenseLayout:
        """The layout of a step's old and (in place) new tokens."""
        plan = view.plan
        in_place = view.old is None
        rows = [row.after if in_place else row.before for row in plan.rows]
        columns = view.length if in_place else plan.dense_before
        slots = torch.zeros(len(rows), columns, dtype=torch.long)
        delta = torch.zeros(len(rows), columns, dtype=torch.long)
        for index, (row, stretches) in enumerate(zip(plan.rows, rows, strict=True)):
            column = columns - sum(stretch.length for stretch in stretches)
            for stretch in stretches:
                if view.storage.codecs is None:
                    stop = stretch.slot + stretch.length
                    slots[index, column : column + stretch.length] = torch.arange(stretch.slot, stop)
                for token, length, shift in view.shifts(row, stretch):
                    at = column + token - stretch.token
                    delta[index, at : at + length] = shift
                column += stretch.length
        moved = delta.any(0).nonzero()
        start, stop = (int(moved[0]), int(moved[-1]) + 1) if len(moved) else (0, 0)
        whole = len(rows) == 1 and len(rows[0]) == 1 and rows[0][0].length == columns
        return cls(rows[0][0] if whole else None, slots, rows, delta[:, start:stop], start, stop)

    def slots_on(self, device: torch.device) -> Tensor:
        """`slots` on a device; kept there, as the group's other layers ask again."""
        if self.slots.device != device:
            self.slots = self.slots.to(device)
        return self.slots

    def turn(self, keys: Tensor, facts: RotaryFacts | None) -> Tensor:
        """`keys` with the columns that need it turned, from the originals, in one shot."""
        if facts is None or self.start == self.stop:
            return keys
        if facts.inv_freq not in self.rotations:
            delta = self.delta.to(keys.device)[:, None]
            self.rotations[facts.inv_freq] = rotation(delta, facts, keys.device)
        turned = turn(keys[:, :, self.start : self.stop], *self.rotations[facts.inv_freq], facts)
        return torch.cat([keys[:, :, : self.start], turned, keys[:, :, self.stop :]], dim=2)


def dense_states(view: StepView) -> tuple[Tensor, Tensor]:
    """K and V as stock attention wants them, `(batch, kv_heads, length, head_dim)`, rows right-aligned."""
    view.store()
    if view.plan.dense_before == 0:
        return view.keys, view.values
    key = ("dense", view.facts is None)  # a model may rotate some layers only (SmolLM3)
    if key not in view.plan.memo:
        view.plan.memo[key] = DenseLayout.of(view)
    layout: DenseLayout = view.plan.memo[key]
    if view.old is not None:
        keys, values = view.storage.plain(_old(view, view.keys, 1), _old(view, view.values, 2))
        keys = torch.cat([layout.turn(keys, view.facts), view.keys], dim=2)
        return keys, torch.cat([values, view.values], dim=2)
    if view.storage.codecs is not None:
        keys, values = _decoded(view, layout.rows)
    elif layout.single is not None:
        keys, values = (part[None] for part in view.storage.read(layout.single))
    else:
        keys, values = view.storage.gather(layout.slots_on(view.keys.device))
    return layout.turn(keys, view.facts), values


def _decoded(view: StepView, rows: list[list[Stretch]]) -> tuple[Tensor, Tensor]:
    """All rows' tokens in the model's basis, right-aligned, `(batch, kv_heads, length, head_dim)`."""
    joined = [like.new_zeros(*like.shape[:2], view.length, like.shape[-1]) for like in (view.keys, view.values)]
    for index, stretches in enumerate(rows):
        column = view.length - sum(stretch.length for stretch in stretches)
        row = view.plan.rows[index]
        for stretch, states in (piece for held in stretches for piece in view.not_encoded(index, row, held)):
            stop = column + stretch.length
            for target, part in zip(joined, states or view.storage.read(stretch), strict=True):
                target[index, :, column:stop] = part
            column = stop
    keys, values = view.storage.plain(*joined)
    # The step's own tokens are there unquantized.
    new = slice(view.plan.dense_before, None)
    keys[:, :, new], values[:, :, new] = view.keys, view.values
    return keys, values


def _old(view: StepView, like: Tensor, which: int) -> Tensor:
    """The copies of a step that is not in place, right-aligned, `(batch, kv_heads, dense_before, head_dim)`."""
    joined = like.new_zeros(*like.shape[:2], view.plan.dense_before, like.shape[-1])
    for index, pieces in enumerate(view.old or []):
        column = view.plan.dense_before - sum(piece[0].length for piece in pieces)
        for piece in pieces:
            part: Tensor = piece[which]  # type: ignore[assignment]
            joined[index, :, column : column + part.shape[1]] = part
            column += part.shape[1]
    return joined
