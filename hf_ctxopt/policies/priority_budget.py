"""Which pages of one long text go when its budget is full: the lowest priority first, then the oldest.

Ranks as in TensorRT-LLM (`policies/priority.py`), inside one sequence: a system prompt or a tool's result outlives
chatter. Nothing is pinned: of equal priorities the oldest goes, whatever they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .priority import DEFAULT_PRIORITY, Retention

PageFacts = tuple[int, bool, float]
"""Of a full page: its first token, in the row's own indices; whether a one-token step began it, so that it belongs to
an answer; and when it was begun, by the clock."""


class PriorityBudget:
    """Keeps a row within so many tokens.

    Args:
        retention: priorities.
        page_size: tokens of a page.
        tokens: most tokens of a row; `None` until `nbytes` has been divided among the rows.
        nbytes: most bytes of the cache.
        clock: seconds, for priorities that end; a duration begins with the page.
    """

    def __init__(
        self,
        retention: Retention,
        page_size: int,
        tokens: int | None,
        nbytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.retention, self.page_size, self.tokens, self.nbytes, self.clock = (
            retention, page_size, tokens, nbytes, clock,
        )  # fmt: skip

    def excess(self, held: int, coming: int) -> int:
        """Pages that go before a step of `coming` tokens on top of `held` ones.

        A chunk of more than half the budget does not push out everything else: the other half stays, and the budget
        holds again when the next step begins.
        """
        if self.tokens is None:
            return 0
        room = max(self.tokens - coming, self.tokens // 2)
        return max(0, -(-(held - room) // self.page_size))

    def victims(self, pages: Sequence[PageFacts], count: int) -> list[int]:
        """Which of the pages go, by their place in `pages`.

        Args:
            pages: full pages that may go, in text order.
            count: how many.
        """
        order = sorted(range(len(pages)), key=lambda at: (self.priority(pages[at]), at))
        return sorted(order[:count])

    def priority(self, page: PageFacts) -> int:
        """What a page is worth now: the worth of its first token."""
        first, generated, born = page
        found, duration = self.retention.of_token(first, first if generated else first + 1)
        if found is None or (duration is not None and self.clock() - born > duration):
            return DEFAULT_PRIORITY
        return found
