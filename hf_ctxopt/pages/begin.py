"""Beginning a step that was admitted: evict, seal, extend the rows, and list what every layer has to do.

The order matters: all drops come before all takes, because what one row gives back another may need, and pages are
sealed before any is written, because an open page that was sealed may be taken again in the same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .capacity import trim
from .holes import drop, gaps
from .plan import Fill, Pages, RowStep, StepPlan, StepRequest, Write
from .pool import SEALED
from .rows import Row, Stretch
from .wanted import begun_page, filled_page, missing_pages, sealed_directly, unsealed

if TYPE_CHECKING:
    from .group import LayerGroup


def begin(group: LayerGroup, request: StepRequest) -> StepPlan:
    """Change the group's table for the step and return the plan that its layers carry out."""
    group.request, group.rows = None, request.rows
    columns = group.dense_length(request.queries)
    plan = StepPlan(group.seen, request.queries, request.in_place, columns, request.sealing)
    group.before_eviction = None if request.evicting else group.before_eviction
    group.dropped = any(request.drops)
    for row, pages in zip(group.rows, request.drops, strict=True):
        drop(group, row, pages)
    evict(group, request.pages)
    starts = [_retire(group, row, keep, plan.in_place) for row, keep in zip(group.rows, request.keep, strict=True)]
    if group.codecs is not None:
        _seal(group, plan)
        if plan.sealing:
            for index, row in enumerate(group.rows):
                _fill(group, plan, index, row, request.ends[index])
    for index, (before, start, lower) in enumerate(starts):
        after = _extend(group, plan, index, request.ends[index], request.keep[index])
        step = RowStep(group.rows[index].pad, start, request.ends[index], lower, before,
                       after if plan.in_place else [], gaps(group.rows[index], group.page_size))  # fmt: skip
        plan.rows.append(step)
    plan.brief = _brief(plan)
    plan.single = _single(plan, group.page_size) if plan.brief else None
    group.seen += request.queries
    return plan


def _brief(plan: StepPlan) -> bool:
    """See `StepPlan.brief`: most steps of a text that is decoded alone."""
    if plan.queries > 1 or not plan.in_place or not plan.dense_before or len(plan.rows) > 1:
        return False
    return not (plan.seals or plan.fills or plan.copies) and len(plan.writes) == 1 and plan.rows[0].start > 0


def _single(plan: StepPlan, page_size: int) -> Stretch | None:
    """See `StepPlan.single`: what brief steps of short and of unquantized texts read."""
    if len(plan.rows[0].after) != 1:
        return None
    held = plan.rows[0].after[0]
    # Columns of padding, or a token that is not kept, leave the stretch shorter than the dense route's K and V.
    whole = held.length == plan.dense_before + 1 and plan.writes[0].slot == held.slot + held.length - 1
    return held if whole and not held.sealed(page_size) else None


def evict(group: LayerGroup, needed: Pages | None = None) -> None:
    """Drop what no query from the next one on can see; `needed` as in `trim`."""
    for row in group.rows:
        row.lower = max(row.lower, group.policy.horizon(row.length))
        if row.lower:
            group.drop_below(row, row.lower, row.length)
    trim(group, needed)


def _retire(group: LayerGroup, row: Row, keep: int, in_place: bool) -> tuple[list[Stretch], int, int]:
    """Drop what will not outlive the step; returns what was held, the tokens seen and the lower bound."""
    before = [] if in_place else row.stretches(group.page_size, group.policy.sinks)
    if keep > row.lower:
        group.drop_below(row, keep, row.length)
    return before, row.length, row.lower


def _seal(group: LayerGroup, plan: StepPlan) -> None:
    """Exchange open pages that are full for sealed ones. Rows that share a page share the sealed one too."""
    done: dict[int, int] = {}
    for row in group.rows:
        for logical, page in unsealed(group, row):
            if page in done:
                group.sealed.share([done[page]])
            else:
                done[page] = group.sealed.take(1, _last(row, sealed=True), leave_room=len(group.rows) > 1)[0]
                plan.seals.append((page, done[page]))
            group.replace(row, logical, done[page])
        row.sealed = max(row.sealed, row.length // group.page_size)


def _last(row: Row, sealed: bool) -> int | None:
    """The row's last sealed, or last open, page: where the next one had best follow."""
    runs = (run for run in reversed(row.runs) if (run.page >= SEALED) == sealed)
    return next((run.page + run.count - 1 for run in runs), None)


def _fill(group: LayerGroup, plan: StepPlan, index: int, row: Row, end: int) -> None:
    """Exchange a begun page that the step fills for the sealed page it becomes."""
    page = filled_page(group, row, end)
    if page is None:
        return
    size, logical = group.page_size, row.length // group.page_size
    sealed = group.sealed.take(1, _last(row, sealed=True), leave_room=len(group.rows) > 1)[0]
    column = row.length - end + plan.queries
    plan.fills.append(Fill(index, column, (logical + 1) * size - row.length, page, sealed))
    group.replace(row, logical, sealed)


def _extend(group: LayerGroup, plan: StepPlan, index: int, end: int, keep: int) -> list[Stretch]:
    """Add the row's new pages and list its writes; returns all tokens held after the step."""
    row, start, size = group.rows[index], group.rows[index].length, group.page_size
    if end > start:
        _own_tail(group, plan, row)
    whole = sealed_directly(group, row, end) if plan.sealing else range(0)
    missing = [page for pages in missing_pages(group, row, end, keep) for page in pages]
    if missing:
        direct = [logical for logical in missing if logical in whole]
        leave_room = len(group.rows) > 1
        opened = iter(group.pool.take(len(missing) - len(direct), _last(row, sealed=False), leave_room))
        sealed = iter(group.sealed.take(len(direct), _last(row, sealed=True), leave_room))
        for logical in missing:
            row.add(logical, next(sealed if logical in whole else opened))
            if group.evictor is not None:
                row.marks[logical] = plan.queries == 1, group.evictor.clock()
    row.length, row.lower = end, keep
    if keep > start:
        row.whole = keep
    if plan.sealing:
        # A page that began in the middle, because its head was evicted, is sealed when the next step begins.
        begun = begun_page(group, row, start)
        row.sealed = max(row.sealed, start // size if begun is not None and begun < SEALED else end // size)
    held = row.stretches(size, group.policy.sinks)
    for piece in held:
        skip = max(0, start - piece.token)
        if skip < piece.length and piece.slot < SEALED * size:
            column = piece.token + skip - end + plan.queries
            plan.writes.append(Write(index, column, piece.slot + skip, piece.length - skip))
    for run in row.runs if whole else ():
        # Whole pages, also where the step's own later tokens have pushed the first of them out of the window.
        low, high = max(run.first, whole.start), min(run.first + run.count, whole.stop)
        if low < high and run.page >= SEALED:
            slot, column = (run.page + low - run.first) * size, low * size - end + plan.queries
            plan.writes.append(Write(index, column, slot, (high - low) * size))
    return held


def _own_tail(group: LayerGroup, plan: StepPlan, row: Row) -> None:
    """Copy-on-write: a partly filled last page that other rows hold too is copied before it is written."""
    logical = row.length // group.page_size
    page = row.page_of(logical)
    if page is not None and page < SEALED and group.pool.references(page) > 1:
        target = group.pool.take(1, page)[0]
        plan.copies.append((page, target))
        group.replace(row, logical, target)
