"""A prompt goes on where memory runs out: the chunk that failed is taken back, halved and read again.

Wrapped around `GenerationMixin._prefill`, which reads a prompt at once or in chunks. When one of its forward passes
runs out of memory, the cache is taken back to the tokens before that pass (a pass that every layer has stored is kept,
unless it is the last, whose logits are needed), and the rest is read in pieces here, each half as long as the one that
failed, down to `LEAST` tokens or a page. What was read before is kept. Only a pass that had let go of tokens of a
window (a chunk longer than it), or for which a budget by priority had dropped pages, cannot be taken back: there the
whole text is read again. Where `generate` was given its new tokens only, a cache without a budget keeps the window's
old pages until the chunk is through; elsewhere `InterruptedStepError` says that the text has to be fed again.

Not halved are prompts of `inputs_embeds`, of encoder-decoders and of models in training mode, those of assisted
decoding, which reads them by itself, and those that continue a text in chunks before transformers 5.23.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches.base import PageCache, attention_cache
from ..caches.layer import PageLayer
from ..errors import ConfigError, InterruptedStepError, out_of_memory
from .compat import cache_in
from .generate import only_text, slices_chunks
from .positions import padding_of

LEAST = 16
_COLUMNS = ("attention_mask", "position_ids", "token_type_ids")

Prefill = Callable[..., Any]


def read_halving(
    original: Prefill, model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any],
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """`original(model, input_ids, generation_config, model_kwargs, ...)`, in smaller chunks where memory runs out.

    Args:
        original: `GenerationMixin._prefill`.
        model: the model.
        input_ids: the prompt, `(batch, seq)`: the whole text, or what the cache does not hold yet.
        generation_config: of the call.
        model_kwargs: of the call.
        *args: further arguments of `original`.
        **kwargs: likewise.

    Raises:
        torch.OutOfMemoryError: memory runs out at chunks of `LEAST` tokens, or of a page, too; or whatever else said
            so. The cache holds what was read before the chunk that failed (nothing, where the whole text would have
            had to be read again).
        InterruptedStepError: a window has let go of tokens, or a budget has dropped pages, for the chunk that failed,
            and the new ones are all that was given; `reset()` the cache and feed the whole text.
    """
    cache = attention_cache(cache_in(model_kwargs))
    if cache is None or not _splits(model, cache, generation_config, model_kwargs):
        return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    prompt = _prompt(cache, input_ids, generation_config, model_kwargs)
    with _guarded(cache, prompt):
        try:
            return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not _taken_back(error, cache, prompt, prompt.last):
                raise
        model_kwargs.clear()
        model_kwargs.update(prompt.given)

        def read(at: int, stop: int) -> Any:
            ids, given = prompt.piece(at, stop)
            return original(model, ids, generation_config, given, *args, **kwargs)

        generation_config.prefill_chunk_size = None
        try:
            return _in_pieces(read, cache, prompt)
        finally:
            generation_config.prefill_chunk_size = prompt.given_chunk


@dataclass(frozen=True)
class _Prompt:
    """What was asked for.

    Args:
        ids: `(batch, seq)`.
        first: column of the text that `ids` begin with.
        start: columns that the cache held before.
        given_chunk: tokens of a chunk that were asked for; `None` for the prompt at once.
        least: tokens of the smallest chunk.
        given: the call's arguments as they came.
    """

    ids: Tensor
    first: int
    start: int
    given_chunk: int | None
    least: int
    given: dict[str, Any]

    @property
    def columns(self) -> int:
        """Columns of the whole text."""
        return self.first + self.ids.shape[1]

    @property
    def chunk(self) -> int:
        """Tokens of a chunk at first."""
        return max(1, self.columns - self.start) if self.given_chunk is None else self.given_chunk

    @property
    def last(self) -> int:
        """Column that the last chunk begins with."""
        return self.start + max(0, self.columns - self.start - 1) // self.chunk * self.chunk

    def piece(self, at: int, stop: int) -> tuple[Tensor, dict[str, Any]]:
        """The ids of columns `[at, stop)`, and the call's arguments for them."""
        kwargs = dict(self.given)
        for name in _COLUMNS:
            value = kwargs.get(name)
            if isinstance(value, Tensor):
                kwargs[name] = value[..., : value.shape[-1] - (self.columns - stop)]
        return self.ids[:, at - self.first : stop - self.first], kwargs


def _splits(model: Any, cache: PageCache, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt may be read in pieces, and the cache taken back to any column of it."""
    if model.config.is_encoder_decoder or model.training or not only_text(model_kwargs):
        return False
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return False
    if generation_config.prefill_chunk_size is not None and not slices_chunks(cache.get_seq_length()):
        return False
    # Another layer's states (linear attention) cannot be taken back; a DummyLayer only reads another layer's pages.
    return all(isinstance(layer, PageLayer) or type(layer).__name__ == "DummyLayer" for layer in cache.layers)


def _prompt(cache: PageCache, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> _Prompt:
    mask, start = model_kwargs.get("attention_mask"), cache.get_seq_length()
    length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    first = 0 if length == input_ids.shape[1] else start
    least = max(LEAST, cache.options.page_size)
    return _Prompt(input_ids, first, start, generation_config.prefill_chunk_size, least, dict(model_kwargs))


@contextmanager
def _guarded(cache: PageCache, prompt: _Prompt) -> Iterator[None]:
    """Every step can be taken back without loss, even a finished one; or the whole text is there to be read again."""
    before = [(group, group.guarded, group.keeping) for group in cache.groups]
    for group in cache.groups:
        group.guarded = True
        limited = group.budget.tokens is not None or group.budget.nbytes is not None  # no room for more pages there
        group.keeping = group.keeping or (prompt.first > 0 and not limited)
    try:
        yield
    finally:
        for group, guarded, keeping in before:
            group.guarded, group.keeping = guarded, keeping
            if group.plan is None:
                group.begun = {}


def _in_pieces(read: Callable[[int, int], Any], cache: PageCache, prompt: _Prompt) -> Any:
    """Read the rest of the prompt, each piece half as long as the one before that failed; the last piece's outputs."""
    size, failed, outputs = prompt.chunk, True, None
    while outputs is None or failed or cache.get_seq_length() < prompt.columns:
        at = cache.get_seq_length()
        if failed:
            size = max(prompt.least, min(size, prompt.columns - at) // 2)
            _free(prompt.ids.device)
            cache.context.relieve("a prefill chunk ran out of memory and was halved")
        stop, failed = min(prompt.columns, at + size), False
        try:
            outputs = read(at, stop)
        except (RuntimeError, MemoryError) as error:
            kept = at if stop == prompt.columns else stop
            if not _taken_back(error, cache, prompt, kept, stop - at):
                raise
            failed = True
    return outputs


def _taken_back(error: BaseException, cache: PageCache, prompt: _Prompt, at: int, size: int | None = None) -> bool:
    """Take a chunk back that ran out of memory; returns whether a smaller one may do.

    Args:
        error: what it raised. Of anything else than a lack of memory nothing is taken back.
        cache: the cache.
        prompt: what is read.
        at: column that the text goes back to where the chunk has gone through every layer.
        size: the chunk's tokens; `None` for those of the first try.
    """
    if not out_of_memory(error):
        return False
    traceback.clear_frames(error.__traceback__)  # they hold the activations that were too many
    before = [group.seen for group in cache.groups]
    try:
        cache.settle()
        if cache.get_seq_length() > at:
            cache.crop(at - cache.get_seq_length())
        if any(group.dropped and group.seen < seen for group, seen in zip(cache.groups, before, strict=True)):
            raise InterruptedStepError(
                "the budget had dropped pages for the chunk that ran out of memory; call cache.reset() and feed the "
                "whole text again"
            )
    except (InterruptedStepError, ConfigError):
        if prompt.first > 0:
            raise
        _begin_again(cache, prompt)
        return prompt.chunk > prompt.least if size is None else size > prompt.least
    seen = cache.get_seq_length()
    if size is None and seen > prompt.start and before == [seen] * len(before):
        return True  # a whole chunk was kept: what is left, however short, has not failed yet
    return (min(prompt.chunk, prompt.columns - seen) if size is None else size) > prompt.least


def _begin_again(cache: PageCache, prompt: _Prompt) -> None:
    """Forget the text, which is at hand, but not what is known of it."""
    known = [(group.announced, group.recording) for group in cache.groups]
    cache.reset()  # type: ignore[no-untyped-call]
    pads = padding_of(prompt.given.get("attention_mask"))
    for group, (announced, recording) in zip(cache.groups, known, strict=True):
        group.pads, group.announced, group.recording = pads, announced, recording
    cache.context.relieve(
        "a text was read again from its beginning: a window or a budget had let go of tokens for the failed chunk"
    )


def _free(device: torch.device) -> None:
    """Give back what the allocator keeps: the next chunk's blocks have other sizes."""
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()
