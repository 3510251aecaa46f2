"""`ctx_paged`: everything is kept, in pages.

Source of the scheme: PagedAttention (Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

from ..policies.sink_window import SinkWindow
from .base import PageCache


class PagedCache(PageCache):
    """Keeps every token. Sliding layers of the model keep their own window."""

    name = "ctx_paged"

    def policy(self, model_window: int | None, all_sliding: bool) -> SinkWindow:
        """Everything, or what the model's own window can still see."""
        return SinkWindow(window=model_window)
