"""Making a cache for a model: options, layer types, rotary facts and padding come together here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import transformers.cache_utils
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..caches import CACHES
from ..caches.base import PageCache
from ..caches.context import ATTENTION
from ..caches.options import PageOptions, PrefixOptions, PriorityOptions, SinkOptions
from ..caches.prefix import PrefixCache
from ..errors import ConfigError, UnsupportedModelError
from ..models.lengths import length_limit
from ..models.readers import check_reads
from .compat import check_caches
from .fingerprint import place_of
from .positions import PositionGuard, padding_of
from .rope import PositionFacts, decoder_of, position_facts, takes_positions

_ERA = 32768  # positions of an era: float32 angles stay exact to 2e-3 rad, and few steps see two eras


def make_cache(model: nn.Module, name: str, *, attention_mask: Tensor | None = None, **options: Any) -> PageCache:
    """A cache for manual loops, or for `generate(past_key_values=...)`.

    Args:
        model: a transformers model.
        name: `"ctx_paged"`, `"ctx_sink"` or another key of `CACHES`.
        attention_mask: `(batch, seq)` of a left-padded batch; tells each row's first real token.
        **options: the cache's options (`page_size`, `budget`, `window`, `sinks` …).

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
        UnsupportedModelError: the model has no attention layer that pages can hold, or reads its layers itself.
    """
    parsed, inner = parse_options(name, options), unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(inner).__name__} is not a transformers model")
    return build_cache(inner, name, parsed, padding_of(attention_mask))


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; other models as they are."""
    getter = getattr(model, "get_base_model", None)
    inner = getter() if callable(getter) else model
    return inner if isinstance(inner, nn.Module) else model


def parse_options(name: str, options: Any) -> PageOptions:
    """Validated options of the named cache.

    Raises:
        ConfigError: see `make_cache`.
    """
    if not isinstance(name, str) or name not in CACHES:
        raise ConfigError("cache", name, f"one of {', '.join(CACHES)}")
    return CACHES[name].options_type.parse(options)


def build_cache(
    model: nn.Module,
    name: str,
    options: PageOptions,
    pads: Sequence[int] | None = None,
    expected: int | None = None,
) -> PageCache:
    """A cache from validated options.

    Args:
        model: the transformers model itself, not a wrapper.
        name: a key of `CACHES`.
        options: of the cache's own options type.
        pads: left-padding columns per row.
        expected: text length the call is expected to reach at most; `None` if unknown.

    Raises:
        UnsupportedModelError: the call would evict tokens and the model does not allow that, or the model needs other
            caches.
    """
    check_caches(transformers.cache_utils)
    config: Any = model.config
    check_reads(config)
    if isinstance(options, PrefixOptions):
        return PrefixCache(config, options, pads=pads, expected=expected, place=place_of(model))
    if not isinstance(options, SinkOptions | PriorityOptions):
        return CACHES[name](config, options, pads=pads, expected=expected)
    facts = position_facts(model)
    text = config.get_text_config(decoder=True)
    cache = CACHES[name](
        config, options, rotary=facts.rotary, pads=pads, expected=expected,
        before_eviction=_refuse(name, facts), span=_span(text, options) if facts.rotary else None,
    )  # fmt: skip
    if any(group.before_eviction for group in cache.groups):
        _check_length(name, facts, options, expected)
        _check_padding(text, options, pads, expected)
        decoder = decoder_of(model)
        if facts.rotary and takes_positions(decoder):
            cache.guard = PositionGuard(decoder)
    return cache


Evicting = SinkOptions | PriorityOptions


def _refuse(name: str, facts: PositionFacts) -> Callable[[], None]:
    def before_eviction() -> None:
        if facts.refusal is not None:
            raise UnsupportedModelError(
                f"{name} cannot evict here: {facts.refusal}; use ctx_paged, or room for the whole text"
            )

    return before_eviction


def _check_length(name: str, facts: PositionFacts, options: Evicting, expected: int | None) -> None:
    """What can be known before the first token about the text's whole length."""
    if expected is None:
        return
    if options.most_tokens is not None and expected > options.most_tokens:
        _refuse(name, facts)()
    if facts.table is not None and expected > facts.table:
        raise UnsupportedModelError(
            f"the text may reach {expected} tokens and the model has learned {facts.table} positions; "
            "a cache cannot add more: lower max_new_tokens or shorten the prompt"
        )


def _check_padding(text: Any, options: Evicting, pads: Sequence[int] | None, expected: int | None) -> None:
    fused = getattr(text, "_attn_implementation", None) == ATTENTION
    if fused or pads is None or len(set(pads)) == 1:
        return
    if isinstance(options, PriorityOptions):
        if expected is None or options.most_tokens is None or expected > options.most_tokens:
            raise ConfigError(
                "budget", options.budget, "room for the whole text where rows have unequal padding, unless "
                "patch_model() is used: stock attention masks cannot describe rows that lose pages at different times",
            )  # fmt: skip
    elif options.n_discard is not None:
        raise ConfigError(
            "n_discard", options.n_discard, "None for rows of unequal padding, unless patch_model() is used: stock "
            "attention masks cannot describe rows that shift at different times",
        )  # fmt: skip


def check_holes(cache: PageCache, attention_mask: Tensor | None, expected: int) -> None:
    """Refuse masks with zeros behind a row's first token, where stock attention would apply them to other tokens.

    On the dense route the sinks of a cache that has evicted stand under later tokens' columns, and a stock mask reads
    the padding of those columns. The fused route asks for each key's own column.

    Raises:
        ConfigError: the text may reach `expected` tokens, which evicts, and the mask has such zeros.
    """
    if attention_mask is None or cache.context.fused:
        return
    limits = [group.policy.sinks + group.policy.most_held for group in cache.groups
              if group.policy.sinks and group.policy.most_held is not None]  # fmt: skip
    limits += [group.evictor.tokens or 0 for group in cache.groups if group.evictor is not None]
    if not any(expected > limit for limit in limits):
        return
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ConfigError(
            "attention_mask", "zeros behind a row's first token", "left padding only, unless patch_model() is used: "
            "after an eviction stock attention would hide the sinks instead (a text that contains the pad token needs "
            "an attention_mask of ones)",
        )  # fmt: skip


def _span(text: Any, options: Evicting) -> int | None:
    """Positions of an era. Rotary types that rescale with length must never see their trained length exceeded."""
    size = options.most_tokens or _ERA // 2
    span = max(_ERA, 2 * size)
    limit = length_limit(text)
    if limit is None:
        return span
    return min(span, limit) if size < limit else None
