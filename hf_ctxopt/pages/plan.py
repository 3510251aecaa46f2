"""What one forward step does to the pages of a layer group. Every layer of the group carries out the same plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .rows import Row, Stretch


class Pages(NamedTuple):
    """Numbers of open and of sealed pages."""

    open: int
    sealed: int


@dataclass(frozen=True)
class Write:
    """Copy `length` new tokens of batch row `row`, from column `column` on, to token slot `slot` of the pool.

    A slot of a sealed page begins whole pages, which are encoded as they are written.
    """

    row: int
    column: int
    slot: int
    length: int


@dataclass(frozen=True)
class Fill:
    """Encode the open page `page`, filled up by `length` new tokens of row `row` from `column` on, into `sealed`."""

    row: int
    column: int
    length: int
    page: int
    sealed: int


@dataclass(frozen=True)
class RowStep:
    """One row's part in a step, in the row's own token indices.

    Args:
        pad: left-padding columns of the row (label = token + pad).
        start: tokens seen before the step.
        stop: tokens seen after it.
        lower: oldest non-sink token that was held when the step began.
        before: tokens held when the step began, in text order.
        after: all tokens this step's queries may see, where the pages hold them all; otherwise empty.
        gaps: tokens `[start, stop)` that are missing between others, in text order.
    """

    pad: int
    start: int
    stop: int
    lower: int
    before: list[Stretch]
    after: list[Stretch]
    gaps: tuple[tuple[int, int], ...] = ()

    def missing_from(self, token: int) -> int:
        """Tokens that are missing at and behind `token`."""
        return sum(stop - start for start, stop in self.gaps if start >= token)


@dataclass(frozen=True)
class StepRequest:
    """What a step of `queries` columns on top of `seen` columns needs, found out before anything is changed.

    Args:
        rows: the group's rows; new ones before the first step.
        ends: tokens of each row after the step.
        keep: oldest non-sink token of each row that outlives the step.
        in_place: see `StepPlan`.
        evicting: whether a query of the step does not see some earlier token any more.
        sealing: see `StepPlan`.
        pages: pages in use after the step.
        drops: pages of each row that an evictor gives up before it.
    """

    seen: int
    queries: int
    rows: list[Row]
    ends: list[int]
    keep: list[int]
    in_place: bool
    evicting: bool
    sealing: bool
    pages: Pages
    drops: list[list[int]]


@dataclass
class StepPlan:
    """A step of `queries` columns on top of `seen` columns.

    Args:
        in_place: new tokens are written first and everything is read from pages. Otherwise (a chunk longer than the
            window) the kept old tokens are read first, and only the new tokens that outlive the step are written.
        sealing: pages that the step's own tokens fill are sealed as they are written, and its queries read the step's
            tokens from the states themselves. Otherwise they are sealed when the next step begins.
        seals: full open pages to encode first of all, `(open, sealed)`: those that one-token steps have filled.
        fills: begun open pages that the step fills, encoded next.
        copies: pages to copy before writing, `(source, target)`: copy-on-write.
        writes: where the new tokens go.
        encoded: layers that have carried out `seals`, `fills` and `copies` (the pages may be overwritten after that).
        memo: what the layers derive from the plan and share (index tensors, masks); gone with the plan.
        dense_before: columns of old tokens that the dense route presents, right-aligned.
        brief: whether a step of one row with a past writes one token to an open page, and does nothing else.
        single: the one stretch of open pages that is all a brief step reads, its own token last; else `None`.
    """

    seen: int
    queries: int
    in_place: bool
    dense_before: int
    sealing: bool = False
    rows: list[RowStep] = field(default_factory=list)
    seals: list[tuple[int, int]] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    encoded: set[int] = field(default_factory=set)
    memo: dict[object, Any] = field(default_factory=dict)
    brief: bool = False
    single: Stretch | None = None
