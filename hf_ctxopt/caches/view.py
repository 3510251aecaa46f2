"""One layer's keys and values during one step, as attention reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.attention import Segment, attend, attend_whole
from ..kernels.native import attend as native
from ..kernels.rotate import RotaryFacts, rotation, turn
from ..kernels.sealed import SealedSegment
from ..pages.carry_out import write
from ..pages.plan import RowStep, StepPlan
from ..pages.policy import Policy
from ..pages.rows import Stretch
from ..pages.storage import LayerStorage
from . import chunk
from .context import NotReplayable
from .decode import DecodeState
from .positions import PositionLedger

SINK_GAP = -1


class Mask(Protocol):
    """A mask that can be asked about single positions (see `integration/mask.py`)."""

    def plain(self, pads: Sequence[int], reach: int | None = None) -> bool:
        """Whether it is causal attention over everything but `pads` columns of left padding.

        `reach` is how many columns a query is compared with at most; a sliding window that wide hides nothing more.
        """

    def at(self, row: int, queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor | None:
        """Bool `(queries, keys)`; `None` if everything is visible."""


@dataclass
class StepView:
    """What attention needs to know of one layer in one step.

    Args:
        plan: the step.
        storage: the layer's pages.
        keys: the step's new key states, `(batch, kv_heads, queries, key_dim)`.
        values: its new value states, `(batch, kv_heads, queries, value_dim)`.
        policy: the group's policy.
        ledger: position eras.
        facts: how the model rotates; `None` where keys carry no rotation.
        model_window: the model's own mask says all there is to say about this layer's window.
        old: per row, copies of the tokens held before, for a step that is not in place.
        begun: per row whose begun page the step fills and encodes, K and V `(kv_heads, tokens, head_dim)` of the
            tokens that page held: the step's queries must not read them back through scales that later tokens decide.
        stored: `keys` and `values` in the basis of the pages (see `pages/rotation.py`); themselves if it is the
            model's.
        whole: K and V that the step's one query sees, `(1, kv_heads, tokens, head_dim)`, where they are one stretch of
            open pages (see `StepPlan.single`) and nothing is turned.
        decode: device state that kernels read this one-token step from; `None` where plain torch reads the pages.
        written: whether the new states are in the pages; the kernels store them together with the attention.
        on_written: called once they are.
        planned: the step must run on kernels alone; a detour raises `NotReplayable`.
        trusted: the masks are known to show everything the pages hold.
        pass_over: told why the CPU kernel does not read sealed pages that it is meant for.
    """

    plan: StepPlan
    storage: LayerStorage
    keys: Tensor
    values: Tensor
    policy: Policy
    ledger: PositionLedger
    facts: RotaryFacts | None
    model_window: bool = False
    old: list[list[tuple[Stretch, Tensor, Tensor]]] | None = None
    begun: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    stored: tuple[Tensor, Tensor] | None = None
    whole: tuple[Tensor, Tensor] | None = None
    decode: DecodeState | None = None
    written: bool = True
    on_written: Callable[[], None] | None = None
    planned: bool = False
    trusted: bool = False
    pass_over: Callable[[str], None] | None = None

    def store(self) -> None:
        """Write the new states into the pages, unless they are there."""
        if self.written:
            return
        if self.planned:
            raise NotReplayable("a layer's mask hides held tokens, or the model reads cached states by itself")
        self.stored = self.storage.turned(self.keys.detach(), self.values.detach())
        write(self.plan, self.storage, *self.stored)
        self._done()

    def _done(self) -> None:
        self.written = True
        if self.on_written is not None:
            self.on_written()
            self.on_written = None

    @property
    def length(self) -> int:
        """Columns of the dense K/V."""
        return self.plan.dense_before + self.plan.queries

    def gap(self, row: RowStep, token: int) -> int:
        """Tokens missing between the sinks and the first other token that the query at `token` sees."""
        return max(0, max(row.lower, self.policy.horizon(token)) - self.policy.sinks)

    def attend(
        self, query: Tensor, mask: Mask | None, scaling: float, softcap: float | None, sink_logits: Tensor | None
    ) -> Tensor:
        """Attention read from pages.

        Args:
            query: `(batch, heads, queries, key_dim)`.
            mask: the model's mask, asked lazily; `None` for plain causal attention.
            scaling: factor on the scores.
            softcap: see `kernels.attention.attend`.
            sink_logits: `(heads,)` or `None`.

        Returns:
            `(batch, heads, queries, value_dim)`; zeros in padding columns.
        """
        if self.decode is not None and (self.trusted or self._shows_all(mask)):
            states = self.keys.detach(), self.values.detach()
            out = self.decode.attend(query, *states, self.storage, self.facts, scaling, softcap, sink_logits)
            self._done()
            return out
        if self.whole is not None and softcap is None and sink_logits is None and self.plain(mask):
            return attend_whole(query, *self.whole, scaling)
        if self.plan.brief and (found := self._by_places(query[0], mask, scaling, softcap, sink_logits)) is not None:
            return found[None]
        self.store()
        rows = []
        for index, row in enumerate(self.plan.rows):
            count = row.stop - row.start
            own = query[index, :, query.shape[2] - count :]
            turned = row.start > 0  # a row's first tokens meet only each other, in the model's own basis
            if count == 0:
                out = own.new_zeros(own.shape[0], 0, self.values.shape[-1])
            elif chunk.serves(self, own, mask):
                out = chunk.attend_chunk(self, index, row, own, scaling, softcap, sink_logits)
                out = self.storage.plain_values(out) if turned else out
            else:
                segments, tokens = self._segments(index, row, own)
                plain = self.plain(mask)
                causal = plain and row.start == 0 and len(segments) == 1 and self.policy.horizon(row.stop - 1) == 0
                visible = partial(self._visible, index, row, tokens, mask)
                asked = self.storage.turned_query(own) if turned else own
                if self.pass_over is not None and (reason := native.why_not(asked, segments)) is not None:
                    self.pass_over(reason)
                out = attend(asked, segments, visible, scaling, softcap, sink_logits, causal)
                out = self.storage.plain_values(out) if turned else out
            pad = query.shape[2] - count
            rows.append(torch.nn.functional.pad(out, (0, 0, pad, 0)) if pad else out)
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def _by_places(
        self, query: Tensor, mask: Mask | None, scaling: float, softcap: float | None, sink_logits: Tensor | None
    ) -> Tensor | None:
        """`attend` of a brief step over quantized pages by the CPU's kernel; `None` where that does not serve.

        All layers read the same places: they are worked out once a step, and no layer makes a view of its pages.
        """
        storage, memo = self.storage, self.plan.memo
        if storage.codecs is None or self.facts is not None or not self.written or not self.plain(mask):
            return None
        if "places" not in memo:
            memo["places"] = [storage.place(held) for held in self.plan.rows[0].after]
        asked, pages = storage.turned_query(query), storage.all_pages
        if not native.serves_pages(asked, pages, memo["places"]):
            return None
        out = native.attend_pages(asked, pages, memo["places"], scaling, softcap, sink_logits)
        return storage.plain_values(out)

    def _segments(self, index: int, row: RowStep, query: Tensor) -> tuple[list[Segment | SealedSegment], list[range]]:
        """The row's segments with the queries (in the basis of the pages) turned for each, and the tokens of each."""
        turned: dict[tuple[int, int], Tensor | None] = {}
        segments: list[Segment | SealedSegment] = []
        tokens: list[range] = []
        for stretch, states in self._pieces(index, row):
            for token, length, base, leap in self.cut(row, stretch):
                if (base, leap) not in turned:
                    turned[base, leap] = self.turned(row, query, base, leap)
                at = token - stretch.token
                if states is None:
                    part = Stretch(stretch.slot + at, token, length)
                    segments.append(self.storage.segment(part, turned[base, leap]))
                else:
                    keys, values = (state[:, at : at + length] for state in states)
                    segments.append(Segment(keys, values, turned[base, leap]))
                tokens.append(range(token, token + length))
        return segments, tokens

    def _pieces(self, index: int, row: RowStep) -> list[tuple[Stretch, tuple[Tensor, Tensor] | None]]:
        """What the row's queries read, in text order: stretches with their K and V, `None` for sealed pages."""
        pieces: list[tuple[Stretch, tuple[Tensor, Tensor] | None]] = []
        if self.old is not None:
            pieces = [(stretch, (keys, values)) for stretch, keys, values in self.old[index]]
        elif row.start:
            # Its own tokens the step reads from the states, where it has encoded pages of them.
            stop = row.start if self.plan.sealing else row.stop
            for held in row.after:
                if held.token < stop:
                    whole = Stretch(held.slot, held.token, min(held.length, stop - held.token))
                    for stretch, states in self.not_encoded(index, row, whole):
                        lazy = self.plan.queries == 1 and stretch.sealed(self.storage.page_size)
                        pieces.append((stretch, states or (None if lazy else self.storage.read(stretch))))
        if self.old is not None or not row.start or self.plan.sealing:
            first = self.plan.queries - (row.stop - row.start)
            new = Stretch(-1, row.start, row.stop - row.start)
            keys, values = self.stored if row.start and self.stored is not None else (self.keys, self.values)
            pieces.append((new, (keys[index, :, first:], values[index, :, first:])))
        return pieces

    def not_encoded(
        self, index: int, row: RowStep, stretch: Stretch
    ) -> list[tuple[Stretch, tuple[Tensor, Tensor] | None]]:
        """Cut the tokens of `begun` out of a stretch: pieces in text order, with K and V where they are such."""
        begun = self.begun.get(index)
        first = row.start - (begun[0].shape[1] if begun is not None else 0)
        end = stretch.token + stretch.length
        low, high = max(stretch.token, first), min(end, row.start)
        if begun is None or low >= high:
            return [(stretch, None)]
        keys, values = (part[:, low - first : high - first] for part in begun)
        pieces: list[tuple[Stretch, tuple[Tensor, Tensor] | None]] = []
        if stretch.token < low:
            pieces.append((Stretch(stretch.slot, stretch.token, low - stretch.token), None))
        pieces.append((Stretch(-1, low, high - low), (keys, values)))
        if high < end:
            pieces.append((Stretch(stretch.slot + high - stretch.token, high, end - high), None))
        return pieces

    def cut(self, row: RowStep, stretch: Stretch) -> list[tuple[int, int, int, int]]:
        """Cut a stretch at eras and behind the sinks: `(token, length, base, leap)`.

        The leap is the number of tokens missing behind the stretch; `SINK_GAP` for the gap behind the sinks, which
        each query has its own of.
        """
        leap = row.missing_from(stretch.token) if self.facts is not None else 0
        sinks = self.policy.sinks if self.facts is not None and self.gap(row, row.stop - 1) else 0
        found = []
        for label, length, base in self.ledger.split(stretch.token + row.pad, stretch.length):
            token = label - row.pad
            inside = min(max(0, sinks - token), length)
            if inside:
                found.append((token, inside, base, SINK_GAP))
            if inside < length:
                found.append((token + inside, length - inside, base, leap))
        return found

    def shifts(self, row: RowStep, stretch: Stretch) -> list[tuple[int, int, int]]:
        """Positions to turn a stretch's keys by, for the step's first query: `(token, length, shift)` each."""
        gap = self.gap(row, row.start)
        cut = self.cut(row, stretch)
        base = self.ledger.base
        return [(token, n, own - base + (gap if leap == SINK_GAP else leap)) for token, n, own, leap in cut]

    def turned(self, row: RowStep, query: Tensor, base: int, leap: int) -> Tensor | None:
        """The queries as they must be to meet keys of an era and over missing tokens; `None` if as they are.

        `query` is in the model's basis, the result in that of the pages.
        """
        drift = base - self.ledger.base
        if self.facts is None or (drift == 0 and not leap):
            return None
        # Layers that share their frequencies share the rotation; it is computed once a step.
        memo, key = self.plan.memo, ("rotation", self.facts.inv_freq, row.start, row.stop, row.lower, base, leap)
        if key not in memo:
            tokens = range(row.start, row.stop)
            delta = [-(drift + (self.gap(row, token) if leap == SINK_GAP else leap)) for token in tokens]
            memo[key] = rotation(torch.tensor(delta, device=query.device), self.facts, query.device)
        cos, sin = memo[key]
        turned = turn(query, cos, sin, self.facts)
        return self.storage.turned_query(turned) if row.start else turned

    def _shows_all(self, mask: Mask | None) -> bool:
        """Whether a one-token step's queries see every token the pages hold for them."""
        if self.plain(mask):
            return True
        for index, row in enumerate(self.plan.rows):
            tokens = [range(part.token, part.token + part.length) for part in row.after]
            if tokens and self._visible(index, row, tokens, mask, 0, 1) is not None:
                return False
        return True

    def plain(self, mask: Mask | None) -> bool:
        """Whether the mask is causal attention over what the pages hold; asked once a step."""
        if mask is None:
            return True
        memo, key = self.plan.memo, ("plain", mask)
        if key not in memo:
            held = self.policy.most_held
            reach = None if held is None else held + self.policy.sinks
            memo[key] = mask.plain([row.pad for row in self.plan.rows], reach)
        found: bool = memo[key]
        return found

    def _visible(
        self, index: int, row: RowStep, tokens: list[range], mask: Mask | None, start: int, stop: int
    ) -> Tensor | None:
        if stop - start < self.plan.queries:
            return self._look(index, row, tokens, mask, start, stop)  # one block of a long chunk: too large to keep
        memo, key = self.plan.memo, ("visible", index, id(mask))
        if key not in memo:
            memo[key] = self._look(index, row, tokens, mask, start, stop)
        found: Tensor | None = memo[key]
        return found

    def _look(
        self, index: int, row: RowStep, tokens: list[range], mask: Mask | None, start: int, stop: int
    ) -> Tensor | None:
        """Which keys the row's queries `[start, stop)` see, bool `(queries, keys)`; `None` for all."""
        device, sinks = self.keys.device, self.policy.sinks
        single = self.plan.queries == 1 and self.old is None
        plain = self.plain(mask)
        if single and plain:
            return None  # a one-token step holds exactly what its query may see
        query = torch.arange(row.start + start, row.start + stop, device=device)[:, None]
        key = torch.cat([torch.arange(part.start, part.stop, device=device) for part in tokens])[None]
        gaps = [self.gap(row, token) for token in range(row.start + start, row.start + stop)]
        gap = torch.tensor(gaps, device=device)[:, None]
        seen = None
        if not single and not self.model_window:
            seen = (key < sinks) | (key >= gap + sinks) | (gap == 0)
        if mask is None or plain:
            kept = (key >= gap) & (key <= query) if seen is None else seen & (key <= query)
            return None if single else kept
        leaps = [row.missing_from(part.start) for part in tokens]
        leap = torch.repeat_interleave(torch.tensor(leaps), torch.tensor([len(part) for part in tokens])).to(device)
        shifted = key + torch.where(key < sinks, gap, leap) + row.pad
        asked = mask.at(index, query + row.pad, shifted, key + row.pad)
        return asked if seen is None else seen if asked is None else seen & asked
