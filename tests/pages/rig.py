"""A layer group and its layers without a model: tokens are numbers, so what is read back says which token it is.

A token's key in layer `i` is its number plus `LAYER * i`, its value `(-key, 2 * key)`: every layer's copy differs, all
numbers are exact in float32, and K and V have unequal head sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hf_ctxopt.caches.context import ATTENTION, CacheContext
from hf_ctxopt.caches.handle import KVHandle
from hf_ctxopt.caches.layer import PageLayer
from hf_ctxopt.caches.view import StepView
from hf_ctxopt.pages.budget import Budget
from hf_ctxopt.pages.codec import Codec
from hf_ctxopt.pages.group import LayerGroup
from hf_ctxopt.pages.pool import SEALED
from hf_ctxopt.pages.sealed import Codecs
from hf_ctxopt.policies.sink_window import SinkWindow

LAYER = 1 << 16  # float32 sums of a few hundred stay exact enough to tell a token that is missing
TOKEN_BYTES = 4 * (1 + 2)
"""Bytes of one token in one layer: one key channel and two value channels in float32."""


def exact(open_first: int = 0) -> Codecs:
    """Codecs that seal pages and lose nothing: every account of sealed pages can be checked by the numbers."""
    return Codecs(Codec(16, over_tokens=True), Codec(16, over_tokens=False), open_first=open_first)


def states(ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """K `(batch, 1, seq, 1)` and V `(batch, 1, seq, 2)` of the tokens numbered `ids`, `(batch, seq)`."""
    keys = (ids.to(torch.float32) + LAYER * layer)[:, None, :, None]
    return keys, torch.cat([-keys, 2 * keys], dim=-1)


def numbers(start: int, batch: int, queries: int) -> Tensor:
    """`(batch, queries)` token numbers from `start` on, all different."""
    return torch.arange(start, start + batch * queries).view(batch, queries)


def spans(tokens: dict[int, int]) -> list[int]:
    """The tokens held, sorted."""
    return sorted(tokens)


class Rig:
    """Args:
    policy: what the group keeps.
    page_size: tokens of a page.
    layers: number of layers.
    budget: as the `budget` option.
    fused: the layers return handles (else dense tensors).
    **options: of `LayerGroup`.
    """

    def __init__(
        self,
        policy: SinkWindow,
        page_size: int = 4,
        layers: int = 2,
        budget: int | str | None = None,
        fused: bool = True,
        **options: Any,
    ) -> None:
        self.group = LayerGroup(range(layers), policy, page_size, Budget(budget), **options)
        context = CacheContext(SimpleNamespace(_attn_implementation=ATTENTION if fused else "sdpa"))
        self.layers = [PageLayer(self.group, index, context, None, False) for index in range(layers)]

    def update(self, layer: int, ids: Tensor) -> Any:
        """One layer's part of a step: its `StepView` on the fused route, else its dense K and V."""
        keys, values = self.layers[layer].update(*states(ids, layer))
        return keys.view if isinstance(keys, KVHandle) else (keys, values)

    def step(self, ids: Tensor | Sequence[Sequence[int]]) -> list[StepView]:
        """A whole step of the tokens numbered `ids`, `(batch, seq)`: what each layer returned."""
        return [self.update(layer, torch.as_tensor(ids)) for layer in range(len(self.layers))]

    def held(self, row: int, layer: int = 0) -> dict[int, int]:
        """Token → number, read back from a layer's pages through the table; fails if K and V disagree."""
        group, found = self.group, {}
        for stretch in group.rows[row].stretches(group.page_size, group.policy.sinks):
            keys, values = group.storages[layer].read(stretch)
            if not torch.equal(values[0], torch.cat([-keys[0], 2 * keys[0]], dim=-1)):
                raise AssertionError(f"row {row}, layer {layer}: keys and values of {stretch} do not belong together")
            for offset, key in enumerate(keys.flatten().tolist()):
                found[stretch.token + offset] = int(key) - LAYER * layer
        return found

    def account_errors(self) -> list[str]:
        """What is wrong with the accounts, counted here from the table alone."""
        holders = Counter(page for row in self.group.rows for _, page in row.pages())
        wrong, size = list[str](), self.group.page_size
        for pool, first in ((self.group.pool, 0), (self.group.sealed, SEALED)):
            pages = range(first, first + pool.capacity)
            held = sum(page in pages for page in holders)
            if pool.free + held != pool.capacity:
                wrong.append(f"{pool.free} free + {held} held is not {pool.capacity}")
            for page in pages:
                if pool.references(page) != holders[page]:
                    wrong.append(f"page {page}: {pool.references(page)} references, {holders[page]} holders")
            holders = Counter({page: count for page, count in holders.items() if page not in pages})
        wrong += [f"page {page} is held and does not exist" for page in holders]
        for index, row in enumerate(self.group.rows):
            pages = [page for _, page in row.pages()]
            if self.group.codecs is not None:
                kinds = {logical: page >= SEALED for logical, page in row.pages()}
                first = self.group.codecs.open_first
                if any(kinds[logical] for logical in kinds if logical < first or logical >= row.length // size):
                    wrong.append(f"row {index}: a page is sealed that must be open: {kinds}")
            if len(set(pages)) != len(pages):
                wrong.append(f"row {index} lists a page twice: {pages}")
        return wrong

    def picture(self) -> Any:
        """Everything that a failed call must leave as it was, as plain values that can be compared."""
        group = self.group
        table = [(row.pad, row.length, row.lower, list(row.pages())) for row in group.rows if group.seen]
        content = [[self.held(row, layer) for row in range(len(group.rows))] for layer in group.storages]
        return group.seen, dict(group.progress), table, content, group.arena.nbytes, group.arena.used
