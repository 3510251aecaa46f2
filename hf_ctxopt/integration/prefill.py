"""Reuse of cached prefixes inside `generate`: wrappers around `_prefill` and the decoding loops.

`_prefill` is the one place where transformers has both the token ids and the fresh cache. A cache that is filled there
makes it feed only the rest of the prompt. What a hit is, and where none is sought, is counted in `cache.stats()`.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches.base import attention_cache
from ..caches.found import Found
from ..caches.layer import PageLayer
from ..caches.prefix import PrefixCache
from ..errors import out_of_memory
from ..pages.radix_node import same_tokens
from .build import length_limit
from .chunking import chunk_size
from .compat import cache_argument, cache_in, generate_argument
from .fingerprint import fingerprint
from .generate import only_text, slices_chunks
from .halving import read_halving
from .positions import padding_of

Method = Callable[..., Any]


def wrap_prefill(original: Method) -> Method:
    """`GenerationMixin._prefill`, with what a prefix store has put into the cache first, and as `halving.py` says."""

    @functools.wraps(original)
    def prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = attention_cache(cache_in(model_kwargs))
        if not isinstance(cache, PrefixCache):
            return read_halving(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        prompt = _prompt(self, cache, input_ids, model_kwargs)
        if prompt is not None and not cache.get_seq_length():
            reuse(self, cache, prompt, generation_config)
        if prompt is None:
            return read_halving(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs)
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


@dataclass(frozen=True)
class Prompt:
    """The prompt of a batch.

    Args:
        texts: token ids of each row, padding excluded.
        pads: left-padding columns of each row.
        columns: of the batch.
        device: of the ids.
        typed: whether token_type_ids, all of them zero, came with it: some models (GPT-2) add an embedding for zero.
    """

    texts: list[list[int]]
    pads: list[int]
    columns: int
    device: torch.device
    typed: bool = False


def _prompt(model: Any, cache: PrefixCache, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompt | None:
    """The whole text that the cache will hold after the prefill; `None`, counted, where that is not known."""
    pads = cache.groups[0].pads or [0] * input_ids.shape[0]
    typed = model_kwargs.get("token_type_ids") is not None
    why, namespace, texts = _obstacle(model, cache, input_ids, model_kwargs), None, []
    if why is None:
        namespace = (
            ("model", fingerprint(model)),
            ("salt", cache.options.salt),
            *((("types", "0"),) if typed else ()),
        )
        texts = [row[pad:] for row, pad in zip(input_ids.tolist(), pads, strict=True)]
        if cache.get_seq_length() and not cache.continues(namespace, texts):
            why = "the cache holds another text than the prompt begins with, or states of another kind"
    if why is not None:
        cache.namespace = cache.texts = None
        cache.context.compute_all(why)
        return None
    cache.namespace, cache.texts = namespace, texts
    return Prompt(texts, list(pads), input_ids.shape[1], input_ids.device, typed)


def _obstacle(model: Any, cache: PrefixCache, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """Why equal token ids would not mean equal states."""
    if model.config.is_encoder_decoder:
        return "an encoder's output decides about the states, not the tokens alone"
    if not only_text(model_kwargs):
        return "the prompt is more than token ids"
    if model.training:
        return "the model is in training mode"
    if "prepare_inputs_for_generation" in vars(model):  # prompt tuning (PEFT) puts virtual tokens before the prompt
        return "the model's inputs are prepared by somebody else"
    if [group.arena for group in cache.groups] != cache.store.arenas:
        return "the store holds pages of another layout by now"
    other = next((layer for layer in cache.layers if not isinstance(layer, PageLayer)), None)
    if other is not None and type(other).__name__ != "DummyLayer":  # that one only reads another layer's pages
        return f"a {type(other).__name__} keeps a state that pages do not hold"
    if any(_per_row(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        return "adapters chosen row by row"
    mask = model_kwargs.get("attention_mask")
    columns = input_ids.shape[1]
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != columns):
        return "only new tokens were passed" if cache.get_seq_length() else "a mask of another shape than the prompt"
    if cache.get_seq_length() and columns <= cache.get_seq_length():
        return "only new tokens were passed"
    if mask is not None and bool((mask[:, :-1].bool() & ~mask[:, 1:].bool()).any()):
        return "zeros in attention_mask behind a row's first token"
    types = model_kwargs.get("token_type_ids")
    if types is not None and bool((types != 0).any()):
        return "token_type_ids"
    limit = length_limit(model.config.get_text_config(decoder=True))
    if limit is not None and max(columns, *(group.expected or 0 for group in cache.groups)) > limit:
        return "rotary frequencies change with the text's length"
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _usual(positions, mask, columns):
        return "position_ids of the caller's own"
    return None


def _per_row(hook: Any) -> bool:
    """Whether a hook is PEFT's for `adapter_names`: rows of one batch then differ in more than their tokens."""
    return (getattr(getattr(hook, "func", None), "__module__", None) or "").startswith("peft.")


def _usual(positions: Tensor, mask: Tensor | None, columns: int) -> bool:
    """Whether positions count the tokens of each row, as `generate` itself does."""
    if positions.dim() != 2 or positions.shape[1] != columns:
        return False
    pads = torch.tensor(padding_of(mask) or [0] * positions.shape[0], device=positions.device)[:, None]
    wanted = torch.arange(columns, device=positions.device)[None] - pads
    return bool(((positions == wanted) | (wanted < 0)).all())


def reuse(model: Any, cache: PrefixCache, prompt: Prompt, generation_config: Any) -> None:
    """Put what the store has of the prompt into the empty cache, and count it."""
    computed = 0
    found = cache.find(prompt.texts)
    if _worth_warming(cache, prompt, found, generation_config):
        chunk = generation_config.prefill_chunk_size or chunk_size(model, cache.options, None, prompt.columns)
        computed = sum(warm(model, cache, text, chunk, prompt) for text in prompt.texts)
        found = cache.find(prompt.texts)
    seen = common(cache, prompt, found)
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


def common(cache: PrefixCache, prompt: Prompt, found: Sequence[Found]) -> int:
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
    batched = len(prompt.texts) * (prompt.columns - common(cache, prompt, found))
    return 1.25 * (_unique(prompt.texts, found) + len(prompt.texts) * size) < batched


def _unique(texts: Sequence[list[int]], found: Sequence[Found]) -> int:
    """Tokens to compute where each distinct beginning is computed once."""
    total, before = 0, [-1]
    for text, one in sorted(zip(texts, found, strict=True), key=lambda pair: pair[0]):
        total += max(0, len(text) - 1 - max(same_tokens(text, before), one.tokens))
        before = text
    return total


def warm(model: Any, cache: PrefixCache, text: list[int], chunk: int | None, prompt: Prompt) -> int:
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


def _keep_generated(cache: PrefixCache, input_ids: Tensor, sequences: Tensor) -> None:
    """The texts with their answers, but for the last token, which was never fed."""
    seen = cache.get_seq_length()
    if sequences.shape[1] <= seen - 1 or sequences.shape[0] != len(cache.groups[0].rows):
        return
    pads = cache.groups[0].pads or [0] * sequences.shape[0]
    cache.texts = [ids[pad:] for ids, pad in zip(sequences[:, :seen].tolist(), pads, strict=True)]
    for row, text in enumerate(cache.texts):
        cache.keep(row, text, generated=max(0, seen - input_ids.shape[1]))
