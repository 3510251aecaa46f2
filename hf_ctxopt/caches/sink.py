"""`ctx_sink`: the first `sinks` tokens and the last `window`, in constant memory.

Source: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453); context shift as in llama.cpp.
"""

from __future__ import annotations

from ..policies.sink_window import SinkWindow
from .base import PageCache
from .options import SinkOptions


class SinkCache(PageCache):
    """Attention sinks and a sliding window over full-attention layers.

    Sliding layers of the model (Gemma 3, Mistral) keep their own window. Where all layers slide and `sinks +
    window` is smaller than the model's window, the smaller one is used.
    """

    name = "ctx_sink"
    options_type = SinkOptions
    options: SinkOptions

    def policy(self, model_window: int | None, all_sliding: bool) -> SinkWindow:
        """Sinks and window, or what the model's own window can still see."""
        size = self.options.sinks + self.options.window
        if model_window is not None and (not all_sliding or size > model_window):
            return SinkWindow(window=model_window)
        return SinkWindow(self.options.sinks, self.options.window, self.options.n_discard)

    def evicts(self, policy: SinkWindow) -> bool:
        """Only the sinks-and-window groups drop tokens the model would still see."""
        return policy == SinkWindow(self.options.sinks, self.options.window, self.options.n_discard)
