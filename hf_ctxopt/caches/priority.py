"""`ctx_priority`: a budget of tokens, kept by priority and then by recency.

Source of the ranks: TensorRT-LLM, `KvCacheRetentionConfig`; here they decide inside one sequence. Positions are those
of the kept tokens side by side, as in StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnsupportedModelError
from ..pages.arena import Arena
from ..pages.budget import Budget
from ..policies.priority_budget import PriorityBudget
from ..policies.sink_window import SinkWindow
from .base import PageCache
from .options import PriorityOptions


class PriorityCache(PageCache):
    """Full-attention layers keep `budget` tokens of each row. Sliding layers of the model keep their own window.

    When a step begins and would not fit, whole pages go: the lowest priority first, then the oldest. A chunk of more
    than half the budget is held whole, beside the other half, until the next step.

    Args:
        config: see `PageCache`.
        options: the cache's options.
        clock: seconds, for priorities that end.
        **rest: see `PageCache`.

    Raises:
        UnsupportedModelError: every layer of the model slides.
    """

    name = "ctx_priority"
    options_type = PriorityOptions
    options: PriorityOptions

    def __init__(
        self, config: Any, options: PriorityOptions, *, clock: Callable[[], float] = time.monotonic, **rest: Any
    ) -> None:
        super().__init__(config, options, **rest)
        limit = Budget(options.budget)
        for group in self.groups:
            if group.policy.most_held is None:
                group.evictor = PriorityBudget(
                    options.retention, options.page_size, limit.tokens, limit.nbytes, clock
                )  # fmt: skip
        if all(group.evictor is None for group in self.groups):
            raise UnsupportedModelError("every layer slides: the model's own window decides what is kept")

    def policy(self, model_window: int | None, all_sliding: bool) -> SinkWindow:
        """Everything the evictor leaves, or what the model's own window can still see."""
        return SinkWindow(window=model_window)

    def evicts(self, policy: SinkWindow) -> bool:
        """Full-attention layers drop tokens that the model would still see."""
        return policy.window is None

    def _pages(self, policies: Sequence[SinkWindow], arenas: list[Arena]) -> tuple[Budget, list[Arena]]:
        return Budget(None), arenas  # the evictor keeps the budget
