"""What a prompt needs of a cache: the model reads it once, and every attention layer's Q, K and V are looked at.

The model runs as it is, with transformers' own cache; only its attention function is one that looks on. So the figures
are of what attention does with the whole text, not of what a smaller cache would have made of it. The prompt is read
in chunks, of its queries `SAMPLES` spread over the text are looked at and the last ones, and all sums are taken over
blocks of these (`attention_mass.py`), so that memory stays that of reading the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from ..caches.options import PageOptions
from ..errors import ConfigError, UnsupportedModelError
from ..planner.facts import facts_of
from ..planner.needs import BITS, GroupNeeds, Needs
from .attention import stock_attention
from .attention_mass import Scored, outside
from .build import unwrap
from .chunking import compute_device
from .compat import cache_argument
from .mask import LazyMask, lazy_mask
from .patch import configs_of

SINKS, LEAST_WINDOW = 4, 256
LAST = 32
"""Queries at the end of the prompt that count as the answer's side."""
SAMPLES = 256
CHUNK = 512  # tokens read at once


@dataclass
class _Layer:
    """Sums of one layer: over sampled queries by window, `(windows,)`; of the last ones by head, `(windows, heads)`."""

    text: Tensor
    counted: Tensor
    answer: Tensor | None = None
    errors: dict[tuple[str, int], float] = field(default_factory=dict)


class _Watch:
    """An attention function that looks at what it is given.

    Args:
        tokens: of the prompt.
        last: queries of the answer's side.
        windows: candidates.
        page_size: tokens of a page.
    """

    def __init__(self, tokens: int, last: int, windows: Sequence[int], page_size: int) -> None:
        self.tokens, self.last, self.windows, self.page_size = tokens, last, tuple(windows), page_size
        self.step = max(1, tokens // SAMPLES)
        self.read = 0  # tokens of earlier chunks
        self.layers: dict[int, _Layer] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | LazyMask | None,
        scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention as transformers calls it, and its figures taken beside it."""
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and kwargs.get("position_bias") is None:
            mask = None if attention_mask is None else attention_mask[0][..., : key.shape[2]]
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            softcap, drains = kwargs.get("softcap"), kwargs.get("s_aux")
            self._look(index, Scored(query[0], key[0], value[0], scale, mask, softcap, drains))
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)

    def _look(self, index: int, call: Scored) -> None:
        queries, keys = call.query.shape[1], call.key.shape[1]
        places = torch.arange(self.read, self.read + queries, device=call.query.device)
        late = places >= self.tokens - self.last
        layer = self.layers.setdefault(index, _Layer(torch.zeros(len(self.windows)), torch.zeros(len(self.windows))))
        offset = self.read + queries - keys
        if self.windows:
            self._weigh(layer, call, places, late, offset)
        if self.read + queries == self.tokens:
            self._quantize(layer, call.of(late.nonzero()[:, 0]))

    def _weigh(self, layer: _Layer, call: Scored, places: Tensor, late: Tensor, offset: int) -> None:
        chosen = (late | (places % self.step == 0)).nonzero()[:, 0]
        if not chosen.numel():
            return
        for part, probabilities in call.of(chosen).blocks():
            rows = chosen[part]
            mass = outside(probabilities, places[rows], offset, SINKS, self.windows)
            layer.text += mass.nansum((1, 2)).cpu()
            layer.counted += (~mass.isnan()).sum((1, 2)).cpu()
            tail = mass[..., late[rows]].nansum(2).cpu() / self.last
            layer.answer = tail if layer.answer is None else layer.answer + tail

    def _quantize(self, layer: _Layer, call: Scored) -> None:
        for part, states in (("k", call.key), ("v", call.value)):
            for bits in BITS:
                codecs = PageOptions(page_size=self.page_size, kv_bits={"k": 16, "v": 16, part: bits}).codecs(None)
                if codecs is None or states.shape[-1] % (8 // bits):
                    layer.errors[part, bits] = float("inf")  # heads that do not fill whole bytes
                    continue
                layer.errors[part, bits] = call.error(codecs, self.page_size)

    def needs(self, cache: Cache) -> Needs:
        """What was found, by the layers that keep the same tokens."""
        groups: dict[int | None, list[_Layer]] = {}
        for index, layer in sorted(self.layers.items()):
            groups.setdefault(_own_window(cache, index), []).append(layer)
        found = tuple(self._group(window, layers) for window, layers in groups.items())
        return Needs(tokens=self.tokens, last=self.last, sinks=SINKS, windows=self.windows, groups=found)

    def _group(self, window: int | None, layers: list[_Layer]) -> GroupNeeds:
        text = sum(layer.text for layer in layers) / sum(layer.counted for layer in layers)
        heads = torch.cat([layer.answer for layer in layers if layer.answer is not None], 1) if self.windows else None
        errors = {
            part: tuple((sum(layer.errors[part, bits] for layer in layers) / len(layers)) ** 0.5 for bits in BITS)
            for part in "kv"
        }
        return GroupNeeds(
            layers=len(layers), window=window, text=tuple(torch.as_tensor(text).tolist()),
            answer=() if heads is None else tuple(heads.mean(1).tolist()),
            head=() if heads is None else tuple(heads.amax(1).tolist()),
            key_errors=errors["k"], value_errors=errors["v"],
        )  # fmt: skip


def probe(
    model: nn.Module, prompt: Any, *, tokenizer: Any = None, last: int = LAST, page_size: int = 32
) -> Needs:
    """Measure what a prompt needs.

    Args:
        model: a transformers model, loaded; its settings are as before afterwards.
        prompt: token ids, `(1, tokens)` or a list; or text, with a tokenizer.
        tokenizer: turns text into token ids.
        last: queries at the end of the prompt that count as the answer's side.
        page_size: tokens of a page.

    Raises:
        ConfigError: no prompt, one longer than the model was trained on, or text without a tokenizer.
        UnsupportedModelError: the model does not call attention through transformers' `AttentionInterface`, or its
            keys and values cannot be planned for.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise UnsupportedModelError(f"{type(inner).__name__} is not a transformers model with generate()")
    facts = facts_of(inner)
    if not type(inner)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(inner).__name__} does not call attention through transformers' AttentionInterface: what its "
            "prompts need cannot be measured"
        )
    ids = token_ids(prompt, tokenizer)
    if facts.trained is not None and ids.shape[1] > facts.trained:
        raise ConfigError("probe", f"{ids.shape[1]:,} tokens", f"at most {facts.trained:,}, the trained length")
    if isinstance(last, bool) or not isinstance(last, int) or last < 1:
        raise ConfigError("last", last, "an integer >= 1")
    PageOptions(page_size=page_size)  # says what is allowed
    tokens = ids.shape[1]
    watch = _Watch(tokens, min(last, tokens), candidates(tokens), page_size)
    with _watched(inner, watch):
        cache = _read(inner, ids, watch)
    if not watch.layers:
        raise UnsupportedModelError(f"{type(inner).__name__}: none of its layers called the attention function")
    return watch.needs(cache)


def candidates(tokens: int) -> tuple[int, ...]:
    """Windows to measure with a prompt: powers of two from `LEAST_WINDOW` that leave a part of it outside."""
    found, window = [], LEAST_WINDOW
    while SINKS + window < tokens:
        found.append(window)
        window *= 2
    return tuple(found)


def token_ids(prompt: Any, tokenizer: Any = None) -> Tensor:
    """A prompt as `(1, tokens)`.

    Raises:
        ConfigError: it is empty, has several rows, or is text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("probe", "text", "token ids, or text with a tokenizer")
        if not prompt.strip():
            raise ConfigError("probe", prompt, "a prompt that is not empty")
        prompt = tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, Tensor) and not (
        isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt)
    ):
        raise ConfigError("probe", type(prompt).__name__, "text, a list of token ids, or a tensor (1, tokens)")
    ids = torch.as_tensor(prompt, dtype=torch.long)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ConfigError("probe", tuple(ids.shape), "one row of token ids that is not empty")
    return ids


@contextmanager
def _watched(model: PreTrainedModel, watch: _Watch) -> Iterator[None]:
    """The model with `watch` as its attention function, and as it was afterwards."""
    name = f"ctxopt_probe_{id(watch)}"  # one for each probe: several threads may measure their models
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    AttentionInterface.register(name, watch)
    AttentionMaskInterface.register(name, lazy_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _read(model: PreTrainedModel, ids: Tensor, watch: _Watch) -> Cache:
    """Read the prompt in chunks into a cache of transformers' own."""
    forward = type(model).forward
    named = inspect.signature(forward).parameters
    cache = DynamicCache(config=model.config)
    extra: dict[str, Any] = {"use_cache": True, str(cache_argument(forward)): cache}
    if "logits_to_keep" in named:
        extra["logits_to_keep"] = 1
    ids = ids.to(compute_device(model))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, ids.shape[1], CHUNK):
                model(ids[:, start : start + CHUNK], **extra)
                watch.read = min(start + CHUNK, ids.shape[1])
    finally:
        model.train(training)
    return cache


def _own_window(cache: Cache, index: int) -> int | None:
    """The sliding window of the model's own in a layer; `None` for full attention."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    return None if window is None else int(window)
