"""What a prompt needs of a cache: the model reads it once, and every attention layer's Q, K and V are looked at.

The model runs as it is, with transformers' own cache; only its attention function is one that looks on. So the figures
are of what attention does with the whole text, not of what a smaller cache would have made of it. The prompt is read
in chunks, and then the beginning of its answer is written. Looked at are `SAMPLES` queries spread over the text, and
all of the answer's side: the last `LAST` queries of the prompt and the first `ANSWER` of the answer. Beside what
reading needs, that takes `layers * heads * tokens` float32 numbers and the scores of a block (`attention_mass.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from ..caches.options import PageOptions, check_int
from ..errors import ConfigError, UnsupportedModelError
from ..planner.facts import facts_of
from ..planner.needs import BITS, LEAST_WINDOW, SEEK, SINKS, TIMES, GroupNeeds, Needs
from ..policies.sink_window import SinkWindow
from .attention import stock_attention
from .attention_mass import Scored, outside
from .build import unwrap
from .chunking import compute_device
from .compat import cache_argument
from .mask import LazyMask, lazy_mask
from .patch import configs_of

LAST, ANSWER = 16, 16
SAMPLES = 256
CHUNK = 512  # tokens read at once


class _Layer:
    """Sums of one layer.

    Args:
        heads: of queries.
        tokens: of the prompt.
        windows: how many are measured.
        device: of the sums.
    """

    def __init__(self, heads: int, tokens: int, windows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.far = torch.zeros(heads, tokens, device=device)  # attention that a token gets from far queries
            self.seen = torch.zeros(tokens, device=device)  # how many they are
            self.text, self.counted = torch.zeros(windows), torch.zeros(windows)
            self.answer, self.sought = torch.zeros(windows), torch.zeros(windows)
        self.rows = 0  # queries of the answer's side, once for each call: a layer may split its heads in two
        self.errors: dict[tuple[str, int], float] = {}


class _Watch:
    """An attention function that looks at what it is given.

    Args:
        tokens: of the prompt.
        last: of these, those at the end that count as the answer's side.
        windows: candidates.
        page_size: tokens of a page.
    """

    def __init__(self, tokens: int, last: int, windows: Sequence[int], page_size: int) -> None:
        self.tokens, self.last, self.windows, self.page_size = tokens, last, tuple(windows), page_size
        self.step = max(1, tokens // SAMPLES)
        self.read = 0  # tokens of earlier calls
        self.layers: dict[int, _Layer] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | LazyMask | None,
        scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention as transformers calls it, and its figures taken beside it."""
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            mask = None if attention_mask is None else attention_mask[0][..., : key.shape[2]]
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            self._look(
                index, Scored(query[0], key[0], value[0], scale, mask, kwargs.get("softcap"), kwargs.get("s_aux"))
            )
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)

    def _look(self, index: int, call: Scored) -> None:
        heads, queries, _ = call.query.shape
        offset = self.read + queries - call.key.shape[1]
        if index not in self.layers:
            self.layers[index] = _Layer(heads, self.tokens, len(self.windows), call.query.device)
        layer = self.layers[index]
        places = torch.arange(self.read, self.read + queries, device=call.query.device)
        if self.read >= self.tokens - self.last:
            layer.rows += queries
            self._answer(layer, call, places, offset)
            if self.read + queries == self.tokens:
                self._quantize(layer, call)
        elif (chosen := (places % self.step == 0).nonzero()[:, 0]).numel():
            self._text(layer, call.of(chosen), places[chosen], offset)

    def _text(self, layer: _Layer, call: Scored, places: Tensor, offset: int) -> None:
        if not self.windows:
            return
        columns = torch.arange(offset, offset + call.key.shape[1], device=places.device)
        for part, probabilities in call.blocks():
            mass = outside(probabilities, places[part], offset, SINKS, self.windows)
            layer.text += mass.nansum((1, 2)).cpu()
            layer.counted += (~mass.isnan()).sum((1, 2)).cpu()
            far = columns[None] <= places[part, None] - LEAST_WINDOW
            layer.far[:, columns] += (probabilities * far).sum(1)
            layer.seen[columns] += far.sum(0)

    def _answer(self, layer: _Layer, call: Scored, places: Tensor, offset: int) -> None:
        if not self.windows:
            return
        keys = call.key.shape[1]
        usual = torch.zeros(layer.far.shape[0], keys, device=places.device)
        held = slice(offset, min(offset + keys, self.tokens))
        usual[:, : held.stop - held.start] = layer.far[:, held] / layer.seen[held].clamp_min(1)
        for part, probabilities in call.blocks():
            seeking = (probabilities >= SEEK) & (probabilities >= TIMES * usual[:, None])
            for total, shares in ((layer.answer, probabilities), (layer.sought, probabilities * seeking)):
                total += outside(shares, places[part], offset, SINKS, self.windows).mean(1).sum(1).cpu()

    def _quantize(self, layer: _Layer, call: Scored) -> None:
        for part, states in (("k", call.key), ("v", call.value)):
            for bits in BITS:
                codecs = PageOptions(page_size=self.page_size, kv_bits={"k": 16, "v": 16, part: bits}).codecs(
                    SinkWindow()
                )
                fits = codecs is not None and states.shape[-1] % (8 // bits) == 0
                # Heads that do not fill whole bytes cannot be packed at all.
                layer.errors[part, bits] = call.error(codecs, self.page_size) if codecs and fits else float("inf")

    def needs(self, cache: Cache) -> Needs:
        """What was found, by the layers that keep the same tokens."""
        groups: dict[int | None, list[_Layer]] = {}
        for index, layer in sorted(self.layers.items()):
            groups.setdefault(_own_window(cache, index), []).append(layer)
        queries = self.read - (self.tokens - self.last)
        found = tuple(_group(window, layers) for window, layers in groups.items())
        return Needs(tokens=self.tokens, queries=queries, sinks=SINKS, windows=self.windows, groups=found)


def _group(window: int | None, layers: list[_Layer]) -> GroupNeeds:
    def mean(parts: list[Tensor]) -> tuple[float, ...]:
        return tuple(torch.stack(parts).mean(0).tolist())

    errors = {
        part: tuple((sum(layer.errors[part, bits] for layer in layers) / len(layers)) ** 0.5 for bits in BITS)
        for part in "kv"
    }
    return GroupNeeds(
        layers=len(layers), window=window, text=mean([layer.text / layer.counted.clamp_min(1) for layer in layers]),
        answer=mean([layer.answer / layer.rows for layer in layers]),
        sought=mean([layer.sought / layer.rows for layer in layers]),
        key_errors=errors["k"], value_errors=errors["v"],
    )  # fmt: skip


def probe(model: nn.Module, prompt: Any, *, tokenizer: Any = None, answer: int = ANSWER, page_size: int = 32) -> Needs:
    """Measure what a prompt needs.

    Args:
        model: a transformers model, loaded; its settings are as before afterwards.
        prompt: token ids, `(1, tokens)` or a list; or text, with a tokenizer.
        tokenizer: turns text into token ids.
        answer: tokens of the answer to write; 0 for none.
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
    embedding = inner.get_input_embeddings()
    ids = token_ids(prompt, tokenizer, int(getattr(embedding, "num_embeddings", 0) or facts.vocab))
    check_int("answer", answer, 0)
    PageOptions(page_size=page_size)  # says what is allowed
    tokens, least = ids.shape[1], 2 * LAST
    if tokens < least or (facts.trained is not None and tokens > facts.trained):
        most = "" if facts.trained is None else f", and at most {facts.trained:,}, which the model was trained on"
        raise ConfigError("probe", f"{tokens:,} tokens", f"a prompt of at least {least} tokens{most}")
    watch = _Watch(tokens, LAST, candidates(tokens), page_size)
    with _watched(inner, watch):
        cache = _read(inner, ids, watch, min(answer, (facts.trained or tokens + answer) - tokens))
    if not watch.layers:
        raise UnsupportedModelError(f"{type(inner).__name__}: none of its layers called the attention function")
    return watch.needs(cache)


def candidates(tokens: int) -> tuple[int, ...]:
    """Windows to measure with a prompt: powers of two from `LEAST_WINDOW`, and 1.5 times these.

    At most half of the prompt: of a longer window it would say little that as good as everything was inside.
    """
    powers = (LEAST_WINDOW << step for step in range(32))
    return tuple(w for power in powers for w in (power, power * 3 // 2) if SINKS + w <= tokens // 2)


def token_ids(prompt: Any, tokenizer: Any = None, vocab: int | None = None) -> Tensor:
    """A prompt as `(1, tokens)`.

    Raises:
        ConfigError: it is empty, has several rows, or is text without a tokenizer; or its ids are no integers, or not
            of the `vocab` that the model has.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("probe", "text", "token ids, or text with a tokenizer")
        if not prompt.strip():
            raise ConfigError("probe", prompt, "a prompt that is not empty")
        prompt = tokenizer(prompt)["input_ids"]
    if isinstance(prompt, Tensor):
        numbers = prompt.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    else:
        numbers = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
        numbers = numbers and all(type(i) is int and abs(i) < 1 << 62 for i in prompt)  # no bools; those int64 holds
    if not numbers:
        kind = str(prompt.dtype) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ConfigError("probe", kind, "text, a list of token ids, or a tensor (1, tokens) of integers")
    ids = torch.as_tensor(prompt, dtype=torch.long)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ConfigError("probe", tuple(ids.shape), "one row of token ids that is not empty")
    first, last = int(ids.min()), int(ids.max())
    if first < 0 or (vocab is not None and last >= vocab):
        most = "" if vocab is None else f" and below the {vocab:,} that the model knows"
        raise ConfigError("probe", f"token {first if first < 0 else last}", f"token ids from 0 on{most}")
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


def _read(model: PreTrainedModel, ids: Tensor, watch: _Watch, answer: int) -> Cache:
    """Read the prompt in chunks, its end in one of its own, and write the likeliest first tokens of the answer."""
    forward = type(model).forward
    cache = DynamicCache(config=model.config)
    extra: dict[str, Any] = {"use_cache": True, str(cache_argument(forward)): cache}
    if "logits_to_keep" in inspect.signature(forward).parameters:
        extra["logits_to_keep"] = 1
    ids = ids.to(compute_device(model))
    training, end = model.training, ids.shape[1] - watch.last
    chunks = [ids[:, start : min(start + CHUNK, end)] for start in range(0, end, CHUNK)] + [ids[:, end:]]
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(len(chunks) + answer):
                chunk = chunks.pop(0)
                logits = model(chunk, **extra).logits
                watch.read += chunk.shape[1]
                chunks = chunks or [logits[:, -1:].argmax(-1)]
    finally:
        model.train(training)
    return cache


def _own_window(cache: Cache, index: int) -> int | None:
    """The sliding window of the model's own in a layer; `None` for full attention."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    return None if window is None else int(window)
