"""Our part of `generate`: making the cache that its configuration, or the model's patch, names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..caches import CACHES
from ..caches.base import PageCache, attention_cache
from ..caches.options import PageOptions
from ..caches.prefix import PrefixCache
from ..errors import ConfigError, UnsupportedModelError
from ..models.readers import check_reads
from .build import Evicting, build_cache, check_holes, parse_options
from .chunking import chunk_size
from .compat import generate_argument
from .planned import AUTO, Settings, automatic
from .positions import padding_of
from .record import record_of

Prepare = Callable[..., Any]


def wrap_prepare_cache(original: Prepare) -> Prepare:
    """`GenerationMixin._prepare_cache_for_generation`, with our names understood.

    It keeps no state. For everything that is not ours it calls `original` untouched.
    """

    @functools.wraps(original)
    def prepare_cache(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int,
    ) -> Any:  # fmt: skip
        arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        given = model_kwargs.get(generate_argument())
        named = generation_config.cache_implementation in (*CACHES, AUTO)
        if named and (generation_config.is_assistant or given is not None):
            # Assistants get a plain cache (upstream hands them the main model's name and then refuses it), and a cache
            # that is passed wins over the name saved in a configuration. The config is this call's own copy.
            generation_config.cache_implementation = None
        if given is not None:
            _continue(self, given, generation_config, model_kwargs, max_cache_length + 1)
            return original(self, *arguments)
        chosen = None if generation_config.is_assistant else _chosen(self, generation_config)
        if chosen is None or generation_config.use_cache is False:
            return original(self, *arguments)
        cache = _new(self, *chosen, model_kwargs, generation_config, max_cache_length + 1)
        model_kwargs[generate_argument()] = cache
        return None

    return prepare_cache


def _chosen(model: Any, generation_config: Any) -> tuple[str, PageOptions] | None:
    """Cache name and options for this call; `None` if it is not for us."""
    name = generation_config.cache_implementation
    if name == AUTO:
        settings = _automatic(model, generation_config.cache_config)
        return settings.cache, settings.options
    if name in CACHES:
        return name, parse_options(name, generation_config.cache_config)
    record = record_of(model)
    if name is None and record is not None:
        return record.cache, record.options
    return None


def _automatic(model: Any, given: Any) -> Settings:
    if given:
        raise ConfigError("cache_config", given, f"unset: {AUTO} chooses the options")
    return automatic(model, again=False)


def _new(
    model: Any, name: str, options: PageOptions, model_kwargs: dict[str, Any], generation_config: Any, expected: int
) -> Any:
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"{type(model).__name__} brings its own kind of cache; {name} cannot replace it")
    check_reads(model.config, bool(generation_config.return_dict_in_generate))
    encoder_decoder = model.config.is_encoder_decoder
    mask = model_kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    cache = build_cache(model, name, options, padding_of(mask), expected)
    check_holes(cache, mask, expected)
    if encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    prompt = _prompt_length(mask, generation_config)
    _announce(cache, prompt)
    if only_text(model_kwargs):
        _chunk(model, generation_config, cache, prompt)
    return cache


def _continue(model: Any, given: Any, generation_config: Any, model_kwargs: dict[str, Any], expected: int) -> None:
    """A cache from an earlier call comes back: undo what an interrupted or an assisted call left behind."""
    cache = attention_cache(given)
    if cache is None:
        return
    cache.settle()
    if isinstance(cache, PrefixCache):
        cache.kept = True
    cache.context.forget_graph()  # adapters, hooks or weights may have changed between the calls
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    check_holes(cache, mask, expected)
    for group in cache.groups:
        group.recording = False
        group.expected = expected if expected > cache.get_seq_length() else None
        if not group.seen:
            group.pads = padding_of(mask)
    _announce(cache, _prompt_length(mask, generation_config))
    text = not model.config.is_encoder_decoder and only_text(model_kwargs)
    if text and slices_chunks(cache.get_seq_length()):
        total = _prompt_length(model_kwargs.get("attention_mask"), generation_config)
        new = None if total is None else total - cache.get_seq_length()
        _chunk(model, generation_config, cache, new)


def _announce(cache: PageCache, prompt: int | None) -> None:
    """Tell the layer groups the prompt's length, where all rows have as much of it."""
    for group in cache.groups:
        pads = set(group.pads or [0])
        group.announced = prompt - pads.pop() if prompt is not None and len(pads) == 1 else 0


_TEXT_INPUTS = ("attention_mask", "position_ids", "token_type_ids", "cache_position")


def only_text(model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone: transformers splits nothing else into chunks."""
    return not any(isinstance(value, Tensor) and name not in _TEXT_INPUTS for name, value in model_kwargs.items())


def slices_chunks(seen: int) -> bool:
    """Whether chunked prefill feeds only the new tokens; transformers 5.17 feeds all of them again."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return seen == 0 or version >= (5, 23)


def _prompt_length(mask: Tensor | None, generation_config: Any) -> int | None:
    if mask is not None:
        return int(mask.shape[-1])
    length = getattr(generation_config, "_mask_length", None)  # set where an all-ones mask was dropped
    return length if isinstance(length, int) and length > 0 else None


def _chunk(model: Any, generation_config: Any, cache: PageCache, prompt: int | None) -> None:
    if generation_config.prefill_chunk_size is None:
        size = chunk_size(model, cache.options, cache.context.ledger.span, prompt)
        planned = _planned_chunk(model, cache)
        if planned is not None and prompt is not None and prompt > planned:
            # What evicts has reasons of its own for small chunks; otherwise the plan knows more than the rule.
            size = planned if size is None or not isinstance(cache.options, Evicting) else min(size, planned)
        generation_config.prefill_chunk_size = size


def _planned_chunk(model: Any, cache: PageCache) -> int | None:
    """The prefill chunk of the plan that the model was patched with, if the cache is that plan's."""
    record = record_of(model)
    if record is None:
        return None
    # Pages may have been stored with fewer bits since (`PageCache.requantize`).
    return record.chunk if record.options == replace(cache.options, kv_bits=record.options.kv_bits) else None
