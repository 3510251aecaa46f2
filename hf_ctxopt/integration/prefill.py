"""Reuse of cached prefixes inside `generate`: wrappers around `_prefill` and the decoding loops.

`_prefill` is the one place where transformers has both the token ids and the fresh cache. A cache that is filled there
makes it feed only the rest of the prompt. What a hit is, and where none is sought, is counted in `cache.stats()`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..caches.base import attention_cache
from ..caches.prefix import PrefixCache
from .compat import cache_in
from .halving import read_halving
from .prompt import prompt_of
from .reuse import kept_whole, reuse

Method = Callable[..., Any]


def wrap_prefill(original: Method) -> Method:
    """`GenerationMixin._prefill`, with what a prefix store has put into the cache first, and as `halving.py` says."""

    @functools.wraps(original)
    def prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = attention_cache(cache_in(model_kwargs))
        prompt = prompt_of(self, cache, input_ids, model_kwargs) if isinstance(cache, PrefixCache) else None
        if not isinstance(cache, PrefixCache) or prompt is None:
            return read_halving(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        if not cache.get_seq_length():
            reuse(self, cache, prompt, generation_config)
        with kept_whole(cache):
            outputs = read_halving(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs)
            cache.texts = prompt.texts  # a chunk that was taken back has shortened them
            for row, text in enumerate(prompt.texts):
                cache.keep(row, text)
        return outputs

    return prefill


def wrap_decoding(original: Method) -> Method:
    """A decoding loop: one at a time uses a store, and what it generated is kept there."""

    @functools.wraps(original)
    def decoding(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = attention_cache(cache_in(kwargs))
        if cache is not None and original.__name__ == "_assisted_decoding":
            cache.context.read_at_once("assisted decoding reads the prompt by itself")
        if not isinstance(cache, PrefixCache):
            return original(self, input_ids, *args, **kwargs)
        with cache.store.lock:
            if original.__name__ == "_assisted_decoding":
                cache.context.compute_all("assisted decoding feeds the whole prompt by itself")
            result = original(self, input_ids, *args, **kwargs)
            returned = not isinstance(result, Tensor)
            if original.__name__ == "_sample" and cache.namespace is not None:
                _keep_generated(cache, input_ids, result.sequences if returned else result)
            if not returned and not cache.kept:
                cache.release()
        return result

    return decoding


def _keep_generated(cache: PrefixCache, input_ids: Tensor, sequences: Tensor) -> None:
    """The texts with their answers, but for the last token, which was never fed."""
    seen = cache.get_seq_length()
    if sequences.shape[1] <= seen - 1 or sequences.shape[0] != len(cache.groups[0].rows):
        return
    pads = cache.groups[0].pads or [0] * sequences.shape[0]
    cache.texts = [ids[pad:] for ids, pad in zip(sequences[:, :seen].tolist(), pads, strict=True)]
    for row, text in enumerate(cache.texts):
        cache.keep(row, text, generated=max(0, seen - input_ids.shape[1]))
