"""The page table's rows: which pages hold which tokens of one sequence.

A row names its tokens by their index in the sequence, 0 being the first real token: left padding is never
stored. Token `t` lies in logical page `t // page_size`, slot `t % page_size`. Neighbouring logical pages that
also neighbour in the pool form a `Run`, which storage can read as one stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .pool import SEALED

END = 1 << 62  # past any logical page


@dataclass
class Run:
    """`count` pages from logical page `first` on, lying in the pool from `page` on."""

    first: int
    page: int
    count: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(logical page, pool page) pairs."""
        return ((self.first + i, self.page + i) for i in range(self.count))


@dataclass(frozen=True)
class Stretch:
    """`length` tokens from token `token` on, lying in neighbouring slots of the pool from `slot` on."""

    slot: int
    token: int
    length: int

    def sealed(self, page_size: int) -> bool:
        """Whether its pages are sealed."""
        return self.slot >= SEALED * page_size


@dataclass
class Row:
    """One sequence of the batch.

    Args:
        pad: left-padding columns before the row's first token.
        length: tokens seen.
        lower: oldest token held besides the first `sinks`; 0 until something was evicted.
        runs: the pages, in text order.
        sealed: logical pages before this one that were full are sealed, but for leading ones that stay open.
        whole: tokens from here on were all written; a chunk longer than the window leaves a gap before them.
        holes: whole pages that were dropped between others, and the tokens seen when they were.
        marks: of each page, whether a one-token step began it, and when.
    """

    pad: int = 0
    length: int = 0
    lower: int = 0
    runs: list[Run] = field(default_factory=list)
    sealed: int = 0
    whole: int = 0
    holes: dict[int, int] = field(default_factory=dict)
    marks: dict[int, tuple[bool, float]] = field(default_factory=dict)

    def pages(self) -> Iterator[tuple[int, int]]:
        """(logical page, pool page) pairs in text order."""
        for run in self.runs:
            yield from run

    def page_of(self, logical: int) -> int | None:
        """Pool page of a logical page, `None` if it is not held."""
        for run in reversed(self.runs):
            if run.first <= logical < run.first + run.count:
                return run.page + logical - run.first
        return None

    def add(self, logical: int, page: int) -> None:
        """Append logical page `logical`, which comes after all held ones."""
        if self.runs:
            last = self.runs[-1]
            if last.first + last.count == logical and last.page + last.count == page:
                last.count += 1
                return
        self.runs.append(Run(logical, page, 1))

    def replace(self, logical: int, page: int) -> int:
        """Put `page` in place of the held page of `logical`; returns the page it replaces (copy-on-write)."""
        old, runs, self.runs = -1, self.runs, []
        for run in runs:
            at = logical - run.first
            if 0 <= at < run.count:
                old = run.page + at
                self._join(Run(run.first, run.page, at))
                self._join(Run(logical, page, 1))
                self._join(Run(logical + 1, old + 1, run.count - at - 1))
            else:
                self._join(run)
        return old

    def _join(self, run: Run) -> None:
        """Append a run, to the last one where both its text and its pages go on."""
        last = self.runs[-1] if self.runs else None
        if last is not None and (last.first + last.count, last.page + last.count) == (run.first, run.page):
            last.count += run.count
        elif run.count:
            self.runs.append(run)

    def open_pages(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(logical page, pool page) of the open pages among the logical pages `[start, stop)`."""
        found: list[tuple[int, int]] = []
        for run in reversed(self.runs):
            if run.first + run.count <= start:
                break
            if run.page < SEALED:
                found.extend(pair for pair in run if start <= pair[0] < stop)
        return found

    def drop(self, start: int, stop: int) -> list[int]:
        """Stop holding logical pages `[start, stop)`; returns their pool pages."""
        if not any(run.first < stop and start < run.first + run.count for run in self.runs):
            return []
        gone: list[int] = []
        kept: list[Run] = []
        for run in self.runs:
            end = run.first + run.count
            low, high = max(run.first, start), min(end, stop)
            if low >= high:
                kept.append(run)
                continue
            gone.extend(range(run.page + low - run.first, run.page + high - run.first))
            if run.first < low:
                kept.append(Run(run.first, run.page, low - run.first))
            if high < end:
                kept.append(Run(high, run.page + high - run.first, end - high))
        self.runs = kept
        return gone

    def held(self, sinks: int, page_size: int) -> int:
        """Number of tokens held."""
        if self.lower == 0:
            return self.length - len(self.holes) * page_size
        return min(sinks, self.length) + self.length - self.lower

    def stretches(self, page_size: int, sinks: int) -> list[Stretch]:
        """The held tokens, in text order."""
        length = self.length
        spans = [(0, length)] if self.lower == 0 else [(0, min(sinks, length)), (self.lower, length)]
        found: list[Stretch] = []
        for start, end in spans:
            for run in self.runs:
                low = max(start, run.first * page_size)
                high = min(end, (run.first + run.count) * page_size)
                if low < high:
                    found.append(Stretch(run.page * page_size + low - run.first * page_size, low, high - low))
        return found

    def copy(self) -> Row:
        """An independent row over the same pages (the caller counts the new references)."""
        runs = [Run(run.first, run.page, run.count) for run in self.runs]
        return replace(self, runs=runs, holes=dict(self.holes), marks=dict(self.marks))
