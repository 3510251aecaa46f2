"""Steps that are planned before the model runs, so that the run itself is only device work and can be replayed.

An ordinary step is planned by the first layer that arrives (`layer.py`). A decode graph has no layers that arrive: it
plans for all groups here, runs or replays the model, and reports the step as finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.dispatch import decode_kernels, why_not
from ..kernels.paged import refusal
from ..pages.admission import admit
from ..pages.carry_out import prepare
from ..pages.group import LayerGroup
from ..pages.integrity import check
from ..pages.plan import StepPlan
from ..pages.storage import LayerStorage
from .context import CacheContext, NotReplayable, debugging
from .decode import MOST_VARIANTS, DecodeState, spans

if TYPE_CHECKING:
    from .base import PageCache

GROWTH = 32
"""Sealed pages that a row of a replayed batch gets at once, where the length of its text is known."""


def plan_step(cache: PageCache, batch: int) -> list[DecodeState]:
    """Plan a one-token step in all groups, and carry out what precedes it: copies of shared pages and sealing.

    Args:
        cache: a cache that has seen text.
        batch: rows.

    Returns:
        The state of each group, filled for this step.

    Raises:
        NotReplayable: a group cannot be read through kernels; the step may be planned, an ordinary run continues it.
        CacheFullError: the budget has no room; nothing has changed.
    """
    context, states = cache.context, []
    for group in context.groups:
        if len(group.storages) < len(group.layers):
            raise NotReplayable("a layer has stored nothing yet")
        # Growth moves the pages and costs a new graph. What is known to come bounds it (see `capacity.py`).
        group.headroom = 0 if group.expected is None else GROWTH * batch
        first = group.layers[0]
        keys, values = _like(group.storages[first], batch)
        if group.begins(first):
            context.ledger.confirm(group.seen)
            if debugging():
                check(group, strict=True)
            admit(context.groups, group, keys, values)
        plan = group.step(first, keys, values)
        for layer, storage in group.storages.items() if plan.seals or plan.copies else ():
            prepare(plan, layer, storage)
        states.append(decode_state(context, group, plan, group.storages[first]))
    return states


def finish_step(cache: PageCache) -> None:
    """The planned step has been run in all layers."""
    for group in cache.context.groups:
        group.finish_all()
    cache.context.steps["fused"] += len(cache.context.groups)


@contextmanager
def running(context: CacheContext, trusted: bool) -> Iterator[None]:
    """The layers take the planned steps while the model runs inside.

    Args:
        context: the cache's.
        trusted: the masks are known to show everything the pages hold, and are not asked (while a graph is captured).
    """
    context.planned, context.trusted = True, trusted
    for state in context.decoders.values():
        state.angles.clear()
    try:
        yield
    finally:
        context.planned = context.trusted = False


def decode_state(context: CacheContext, group: LayerGroup, plan: StepPlan, storage: LayerStorage) -> DecodeState:
    """The group's state on the storage's device, filled for the step; one for all layers of a device.

    Raises:
        NotReplayable: no kernel reads these pages; the message says why.
    """
    device = storage.keys.device
    memo, key = plan.memo, ("decode", device)
    if key not in memo:
        kernels = decode_kernels(device)
        if kernels is None:
            raise NotReplayable(why_not(device) or "there are no kernels")
        # Layers differ where re-encoding was cut short (see `requantize.py`).
        asked = list(group.storages.values()) if group.arena.uneven else [storage]
        why = next((why for each in asked if (why := refusal(each.keys, each.codec_bits)) is not None), None)
        if why is not None:
            raise NotReplayable(why)
        if any(len(row.gaps) > 1 for row in plan.rows):
            raise NotReplayable("kept pages lie in more than two stretches")
        cut = [spans(row, group.policy, context.ledger) for row in plan.rows]
        variants = max([_usual_variants(group), *map(len, cut)])
        if variants > MOST_VARIANTS:
            raise NotReplayable(f"the window spans more than {MOST_VARIANTS - 1} position eras")
        state = context.decoders.get((group, device))
        if state is None or not state.serves(group.rows, variants):
            pages = [sum(run.count for run in row.runs) for row in group.rows]
            capacity = (storage.capacity + storage.sealed_capacity) // len(group.rows)
            width = max(max(pages) + max(pages) // 4, capacity) + 1
            state = DecodeState(device, len(group.rows), variants, width, kernels)
            context.decoders[group, device] = state
        state.fill(group.rows, plan, cut)
        memo[key] = state
    found: DecodeState = memo[key]
    return found


def _usual_variants(group: LayerGroup) -> int:
    """Variants that the group will need once it evicts: kept from the start, so that one graph serves both."""
    sinks = group.policy.sinks and group.policy.most_held is not None
    return 2 if sinks or group.evictor is not None else 1


@lru_cache(maxsize=64)
def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(storage: LayerStorage, batch: int) -> tuple[Tensor, Tensor]:
    """Tensors without data in the shape of one token's states."""
    keys, values = storage.keys, storage.values
    return (
        _meta((batch, keys.shape[0], 1, keys.shape[-1]), keys.dtype),
        _meta((batch, values.shape[0], 1, values.shape[-1]), values.dtype),
    )
