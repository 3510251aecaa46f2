"""The device side of one-token steps: tables and step state in fixed buffers, and attention through the kernels.

What decides a step is worked out on the host (`pages/begin.py`) and lies in a few small device tensors of fixed shape
and address: the kernels read nothing else, so a captured CUDA graph can be replayed while lengths grow, pages change
and sinks shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.append import QueryTurn
from ..kernels.dispatch import DecodeKernels
from ..kernels.paged import HEADER, PagedStates
from ..kernels.rotate import RotaryFacts
from ..pages.plan import RowStep, StepPlan
from ..pages.policy import Policy
from ..pages.pool import SEALED
from ..pages.rows import Row
from ..pages.storage import LayerStorage
from .positions import PositionLedger

MOST_VARIANTS = 4
"""Query variants that the kernels take: one for the sinks, one for each position era in the window."""


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens `[start, stop)` of a row that one variant of the query meets.

    Args:
        start: first token, in the row's own indices.
        stop: one past the last.
        shift: positions the query is turned by before it meets them.
    """

    start: int
    stop: int
    shift: int


def spans(row: RowStep, policy: Policy, ledger: PositionLedger) -> list[Span]:
    """What the row's one query sees, cut where the query must be turned by another angle.

    Args:
        row: the row's part in a one-token step.
        policy: the group's policy.
        ledger: position eras.
    """
    if row.stop == row.start:
        return []
    gap = max(0, max(row.lower, policy.horizon(row.start)) - policy.sinks)
    parts = [(0, row.stop, 0)] if gap == 0 else [(0, policy.sinks, gap), (gap + policy.sinks, row.stop, 0)]
    if row.gaps:
        starts = [0, *(stop for _, stop in row.gaps)]
        stops = [*(start for start, _ in row.gaps), row.stop]
        parts = [(start, stop, row.missing_from(start)) for start, stop in zip(starts, stops, strict=True)]
    found: list[Span] = []
    for start, stop, leap in parts:
        for label, length, base in ledger.split(start + row.pad, stop - start) if start < stop else []:
            shift = ledger.base - base - leap
            last = found[-1] if found else None
            if last is not None and (last.stop, last.shift) == (label - row.pad, shift):
                found[-1] = Span(last.start, last.stop + length, shift)
            else:
                found.append(Span(label - row.pad, label - row.pad + length, shift))
    return found


class DecodeState:
    """One layer group's table and step state on one device.

    Args:
        device: where the layers are.
        batch: rows.
        variants: query variants, 1 to `MOST_VARIANTS`.
        width: columns of the table.
        kernels: the device's kernels.
    """

    def __init__(self, device: torch.device, batch: int, variants: int, width: int, kernels: DecodeKernels) -> None:
        self.kernels, self.variants = kernels, variants
        self._listed: list[list[tuple[int, int, int]]] = [[] for _ in range(batch)]
        header = HEADER + 2 * variants
        with torch.inference_mode(False):
            self.table = torch.zeros(batch, width, dtype=torch.int32, device=device)
            # One buffer, so that a step costs one copy: rows, then shifts, then slots.
            self._step = torch.zeros(batch * (header + variants + 1), dtype=torch.int32, device=device)
        self.rows = self._step[: batch * header].view(batch, header)
        self.shifts = self._step[batch * header : batch * (header + variants)].view(batch, variants)
        self.slots = self._step[batch * (header + variants) :]
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)
        self.angles: dict[object, tuple[Tensor, Tensor]] = {}  # of this step, by set of frequencies

    def serves(self, rows: Sequence[Row], variants: int) -> bool:
        """Whether the buffers are large enough for these rows."""
        width = max((sum(run.count for run in row.runs) for row in rows), default=0)
        batch, columns = self.table.shape
        return batch == len(rows) and width <= columns and variants <= self.variants

    def fill(self, rows: Sequence[Row], plan: StepPlan, cut: list[list[Span]]) -> None:
        """Write a planned step into the buffers.

        Args:
            rows: the group's rows, as they are after planning.
            plan: the step.
            cut: the spans of each row.
        """
        self.angles.clear()
        slots = [-1] * len(rows)
        for write in plan.writes:
            slots[write.row] = write.slot
        state: list[int] = []
        for index, (row, seen) in enumerate(zip(rows, cut, strict=True)):
            listed = [(run.first, run.page, run.count) for run in row.runs]
            if listed != self._listed[index]:
                self._list(index, listed)
            state += _header(listed) if seen else [0] * HEADER
            for at in range(self.variants):
                state += [seen[at].start, seen[at].stop] if at < len(seen) else [0, 0]
        for seen in cut:
            state += [seen[at].shift if at < len(seen) else 0 for at in range(self.variants)]
        # From pageable memory a non-blocking copy is staged: the list may go while the GPU is still behind.
        self._step.copy_(torch.tensor(state + slots, dtype=torch.int32), non_blocking=True)

    def _list(self, index: int, listed: list[tuple[int, int, int]]) -> None:
        entries = [
            torch.arange(page, page + count, dtype=torch.int32)
            if page < SEALED
            else torch.arange(SEALED - 1 - page, SEALED - 1 - page - count, -1, dtype=torch.int32)
            for _, page, count in listed
        ]
        if entries:
            row = torch.cat(entries)
            self.table[index, : row.shape[0]].copy_(row, non_blocking=True)
        self._listed[index] = listed

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, storage: LayerStorage, facts: RotaryFacts | None,
        scaling: float, softcap: float | None, sink_logits: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Store the step's states and attend to everything the spans name.

        Args:
            query: `(batch, heads, 1, key_dim)`.
            keys: new key states, `(batch, kv_heads, 1, key_dim)`.
            values: new value states, `(batch, kv_heads, 1, value_dim)`.
            storage: the layer's pages.
            facts: how the model rotates; `None` where keys carry no rotation.
            scaling: factor on the scores.
            softcap: see `kernels.attention.attend`.
            sink_logits: `(heads,)` or `None`.

        Returns:
            `(batch, heads, 1, value_dim)`; zeros for rows that see nothing.
        """
        key_basis, value_basis = storage.bases
        turned = self._turn(facts) if facts is not None and self.variants > 1 else None
        asked = self.kernels.append(
            query, keys, values, self.slots, storage.keys, storage.values, turned, self.variants, key_basis,
            value_basis,
        )  # fmt: skip
        pages = storage.paged
        scratch = self._scratch(asked, pages)
        out = self.kernels.decode(
            asked, pages, self.table, self.rows, scaling, softcap, sink_logits, workspace=scratch
        )
        return (out if value_basis is None else out @ value_basis.T)[:, :, None]

    def _turn(self, facts: RotaryFacts) -> QueryTurn:
        """This step's angles, float32 `(batch, variants, rotary_dim / 2)`, worked out in float64; one set a step."""
        if facts.inv_freq not in self.angles:
            turns = self.shifts.to(torch.float64)[..., None] * facts.inv_freq().to(torch.float64)
            self.angles[facts.inv_freq] = turns.cos().to(torch.float32), turns.sin().to(torch.float32)
        return QueryTurn(*self.angles[facts.inv_freq], facts.start, facts.interleaved)

    def _scratch(self, query: Tensor, pages: PagedStates) -> Tensor:
        """The kernels' workspace: the layers run one after the other and share it."""
        needed = self.kernels.workspace_bytes(query, pages, self.table.shape[1])
        if self.workspace.numel() < needed:
            with torch.inference_mode(False):
                self.workspace = torch.empty(needed, dtype=torch.uint8, device=query.device)
        return self.workspace


def _header(listed: list[tuple[int, int, int]]) -> list[int]:
    """Entries, the sealed range, the entries of the sinks and the logical pages left out behind them."""
    entries, sealed, sinks, jump = 0, [0, 0], 0, 0
    following = listed[0][0] if listed else 0
    for first, page, count in listed:
        if first != following:
            sinks, jump = entries, first - following
        if page >= SEALED:
            sealed = [sealed[0] if sealed[1] else entries, entries + count]
        entries, following = entries + count, first + count
    if listed and listed[0][0]:  # no sinks: the text begins later
        jump = listed[0][0]
    return [entries, *sealed, sinks, jump, 0, 0, 0]
