"""What a prefix store has of a prompt, put into its empty cache; rows may be computed ahead of their batch for it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..caches.found import Found
from ..caches.prefix import PrefixCache
from ..errors import out_of_memory
from ..pages.radix_node import same_tokens
from .chunking import chunk_size
from .compat import cache_argument, generate_argument
from .generate import slices_chunks
from .prompt import Prompt


@contextmanager
def kept_whole(cache: PrefixCache) -> Iterator[None]:
    """Layers that slide keep the pages of a whole chunk until they are asked for the next one."""
    for group in cache.groups:
        group.keeping = True
    try:
        yield
    finally:
        for group in cache.groups:
            group.keeping = False


def reuse(model: Any, cache: PrefixCache, prompt: Prompt, generation_config: Any) -> None:
    """Put what the store has of the prompt into the empty cache, and count it."""
    computed = 0
    found = cache.find(prompt.texts)
    if _worth_warming(cache, prompt, found, generation_config):
        chunk = generation_config.prefill_chunk_size or chunk_size(model, cache.options, None, prompt.columns)
        computed = sum(_warm(model, cache, text, chunk, prompt) for text in prompt.texts)
        found = cache.find(prompt.texts)
    seen = _common(cache, prompt, found)
    chunked = generation_config.prefill_chunk_size is not None and not slices_chunks(seen)
    if chunked and prompt.columns - seen > generation_config.prefill_chunk_size:
        cache.context.compute_all("prefill_chunk_size before transformers 5.23 feeds the whole prompt again")
        seen = 0
    if not seen or not cache.adopt(found, seen):
        seen = 0
        cache.store.hold(cache.lease, [])
    elif chunked:
        generation_config.prefill_chunk_size = None  # the rest is fed at once: this version would feed all again
    held = sum(max(0, seen - pad) for pad in prompt.pads)
    cache.count(sum(map(len, prompt.texts)), max(0, held - computed))


def _common(cache: PrefixCache, prompt: Prompt, found: Sequence[Found]) -> int:
    """Columns that every row can begin with."""
    seen = prompt.columns - 1
    while seen > 0:
        lengths = [one.longest(cache.groups, max(0, seen - pad)) for one, pad in zip(found, prompt.pads, strict=True)]
        least = min(
            pad + length if length < seen - pad else seen
            for length, pad in zip(lengths, prompt.pads, strict=True)
        )  # fmt: skip
        if least == seen:
            return seen
        seen = least
    return 0


def _worth_warming(cache: PrefixCache, prompt: Prompt, found: Sequence[Found], generation_config: Any) -> bool:
    """Whether rows had better be computed one by one, up to their last whole page, before the batch begins.

    So rows that share a beginning, beams for one, compute it once; and layers that slide leave the pages of the whole
    prompt in the store, not those of its last window.
    """
    size = cache.store.page_size
    cold = sum(len(text) - 1 - one.tokens for text, one in zip(prompt.texts, found, strict=True))
    if any(group.policy.most_held is not None for group in cache.groups):
        return cold >= size
    if len(prompt.texts) == 1:
        chunked = generation_config.prefill_chunk_size is not None and not slices_chunks(found[0].tokens)
        return chunked and cold > generation_config.prefill_chunk_size
    batched = len(prompt.texts) * (prompt.columns - _common(cache, prompt, found))
    return 1.25 * (_unique(prompt.texts, found) + len(prompt.texts) * size) < batched


def _unique(texts: Sequence[list[int]], found: Sequence[Found]) -> int:
    """Tokens to compute where each distinct beginning is computed once."""
    total, before = 0, [-1]
    for text, one in sorted(zip(texts, found, strict=True), key=lambda pair: pair[0]):
        total += max(0, len(text) - 1 - max(same_tokens(text, before), one.tokens))
        before = text
    return total


def _warm(model: Any, cache: PrefixCache, text: list[int], chunk: int | None, prompt: Prompt) -> int:
    """Compute one row's whole pages that the store lacks, by a cache of its own; returns the tokens computed.

    Where memory runs out, those that are computed by then stay.
    """
    size = cache.store.page_size
    goal = (len(text) - 1) // size * size
    single = cache.sibling(goal)  # before anything is looked up: it may find the budget fallen, and evict
    (found,) = cache.find([text])
    start = found.longest(cache.groups, goal)
    while start % size:  # at the page's beginning a sliding layer looks further back, where pages may be gone
        start = found.longest(cache.groups, start // size * size)
    if start >= goal:
        return 0
    if start and not single.adopt([found], start):
        start = 0
    name = cache_argument(type(model).forward) or generate_argument()
    call: dict[str, Any] = {name: single, "use_cache": True}
    if model._supports_logits_to_keep():
        call["logits_to_keep"] = 1
    try:
        for at in range(start, goal, chunk or goal):
            stop = min(goal, at + (chunk or goal))
            ids = torch.tensor([text[at:stop]], device=prompt.device)
            typed = {"token_type_ids": torch.zeros_like(ids)} if prompt.typed else {}
            with kept_whole(single):
                model(input_ids=ids, **typed, **call)
                single.keep(0, text[:stop])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        cache.context.relieve(
            "memory ran out while a prefix was computed ahead of its batch, which goes on without it"
        )
        return at - start
    finally:
        single.release()
    return goal - start
