"""Carrying out a step's plan on the storage of one layer."""

from __future__ import annotations

from torch import Tensor

from .plan import Fill, StepPlan
from .rows import Stretch
from .storage import LayerStorage


def carry_out(plan: StepPlan, layer: int, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
    """Seal, copy and write as the plan says.

    Args:
        plan: the step.
        layer: index of the layer.
        storage: its pages.
        keys: the step's key states in the basis of the pages, `(batch, kv_heads, seq, key_dim)`.
        values: its value states, `(batch, kv_heads, seq, value_dim)`.
    """
    if layer not in plan.encoded:
        storage.seal(plan.seals)
        for fill in plan.fills:
            part = slice(fill.column, fill.column + fill.length)
            storage.fill(fill.page, fill.sealed, keys[fill.row, :, part], values[fill.row, :, part])
        storage.copy_pages(plan.copies)
        plan.encoded.add(layer)
    write(plan, storage, keys, values)


def prepare(plan: StepPlan, layer: int, storage: LayerStorage) -> None:
    """What precedes the writes of a one-token step, whose states arrive later (see `caches/decode.py`).

    Once only: an open page that was sealed may have been taken again and written when a step is run a second time.
    """
    if layer not in plan.encoded:
        storage.seal(plan.seals)
        storage.copy_pages(plan.copies)
        plan.encoded.add(layer)


def write(plan: StepPlan, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
    """Write a step's states, `(batch, kv_heads, seq, head_dim)` in the basis of the pages, into its pages."""
    for part in plan.writes:
        columns = slice(part.column, part.column + part.length)
        storage.write(keys[part.row, :, columns], values[part.row, :, columns], part.slot)


def begun_tokens(fill: Fill, storage: LayerStorage) -> tuple[Tensor, Tensor]:
    """Copies of the K and V `(kv_heads, tokens, head_dim)` that a begun page holds before the step fills it."""
    size = storage.page_size
    return storage.read(Stretch(fill.page * size, 0, size - fill.length), copy=True)


def take_back(plan: StepPlan, layer: int, storage: LayerStorage) -> None:
    """Do what the table already lists in a layer that has not, or not fully, gone through a step that is undone."""
    if layer not in plan.encoded:
        storage.seal(plan.seals)
        for fill in plan.fills:
            storage.close(fill.page, fill.sealed, storage.page_size - fill.length)
    storage.copy_pages(plan.copies)
