"""What all page caches share: layer groups from the model's own layer types, and the figures they report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.cache_utils import LinearAttentionCacheLayerMixin as StatefulLayer

from ..errors import ConfigError, InterruptedStepError, UnsupportedModelError
from ..kernels.rotate import RotaryFacts
from ..pages.arena import Arena
from ..pages.budget import Budget
from ..pages.group import LayerGroup
from ..pages.integrity import check
from ..pages.requantize import requantize
from ..pages.sealed import Codecs
from ..policies.sink_window import SinkWindow
from .context import CacheContext, debugging
from .layer import PageLayer
from .options import PageOptions
from .positions import PositionLedger


class PageCache(DynamicCache, ABC):
    """A cache whose attention layers live in pages. Subclasses say what each layer keeps.

    Layers that are neither full nor sliding-window attention (linear attention, shared-KV dummies …) keep the
    layer that transformers gives them. A cache is for inference: no gradient flows through the tokens it holds.

    Args:
        config: the model's config.
        options: the cache's options.
        rotary: layer index → rotary facts, for layers whose keys are rotated.
        pads: left-padding columns of each row.
        expected: text length the rows are expected to reach, if known.
        before_eviction: called before the first eviction; raises if the model does not allow it.
        span: positions after which a new position era begins (see `positions.py`).

    Raises:
        UnsupportedModelError: the model has no attention layer that pages can hold.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[PageOptions]] = PageOptions

    def __init__(
        self,
        config: Any,
        options: PageOptions,
        *,
        rotary: Mapping[int, RotaryFacts] | None = None,
        pads: Sequence[int] | None = None,
        expected: int | None = None,
        before_eviction: Callable[[], None] | None = None,
        span: int | None = None,
    ) -> None:
        decoder = config.get_text_config(decoder=True)
        self.options = options
        self.context = CacheContext(decoder, PositionLedger(span))
        self.guard: object | None = None  # keeps the model's position hook alive as long as the cache
        stock = DynamicCache(config=decoder).layers
        windows = {i: window_of(layer) for i, layer in enumerate(stock) if type(layer) in _PAGED}
        if not windows:
            raise UnsupportedModelError(f"{type(config).__name__} has no attention layer that {self.name} can hold")
        policies: dict[SinkWindow, list[int]] = {}
        for index, window in windows.items():
            policies.setdefault(self.policy(window, None not in windows.values()), []).append(index)
        codecs = [options.codecs(policy) for policy in policies]
        arenas = [Arena(layers, options.page_size, codec)
                  for layers, codec in zip(policies.values(), codecs, strict=True)]  # fmt: skip
        budget, arenas = self._pages(list(policies), arenas)
        self.groups = [
            LayerGroup(arena.layers, policy, arena.page_size, budget, pads, expected,
                       before_eviction if self.evicts(policy) else None, arena.codecs, arena)
            for policy, arena in zip(policies, arenas, strict=True)
        ]  # fmt: skip
        layers = list(stock)
        for group in self.groups:
            for index in group.layers:
                facts = (rotary or {}).get(index)
                window = windows[index]
                own = window is not None and group.policy == SinkWindow(window=window)
                layers[index] = PageLayer(group, index, self.context, facts, window is not None, own)
        Cache.__init__(self, layers=layers)

    @abstractmethod
    def policy(self, model_window: int | None, all_sliding: bool) -> SinkWindow:
        """What a layer keeps.

        Args:
            model_window: the sliding window the model itself gives the layer; `None` for full attention.
            all_sliding: whether every layer of the model has one.
        """

    def _pages(self, policies: Sequence[SinkWindow], arenas: list[Arena]) -> tuple[Budget, list[Arena]]:
        """The limit and the pages of the layer groups: the cache's own, unless it shares them."""
        return Budget(self.options.budget), arenas

    def evicts(self, policy: SinkWindow) -> bool:
        """Whether a group drops tokens that the model itself would still attend to."""
        return False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`Cache.update`; compiled layers break here, because a step is planned on the host."""
        return super().update(*args, **kwargs)

    # ---- figures

    @property
    def nbytes(self) -> int:
        """Bytes of K/V storage really held, each storage counted once."""
        return sum(group.arena.nbytes for group in self.groups)

    def stats(self) -> dict[str, Any]:
        """What the cache holds and how it was read, as plain JSON values."""
        groups = [_group_stats(group) for group in self.groups]
        largest = max(groups, key=lambda group: int(group["tokens_held"]))
        return {
            "cache": self.name,
            "tokens_seen": self.get_seq_length(),
            "tokens_held": largest["tokens_held"],
            "tokens_evicted": max(group["tokens_evicted"] for group in groups),
            "bytes_held": self.nbytes,
            "bytes_used": sum(group["bytes_used"] for group in groups),
            "pages": {key: sum(group["pages"][key] for group in groups) for key in groups[0]["pages"]},
            "kv_bits": groups[0]["kv_bits"],
            "steps": {route: self.context.steps[route] for route in ("fused", "dense")},
            "fallbacks": dict(self.context.fallbacks),
            "graph": dict(self.context.graph),
            "relief": dict(self.context.relief),
            "unchunked": dict(self.context.unchunked),
            "groups": groups,
        }

    # ---- care

    def check_integrity(self) -> None:
        """Walk every table and recompute every counter.

        Raises:
            IntegrityError: a violation was found and `CTXOPT_DEBUG=1`; otherwise it is logged and repaired.
        """
        for group in self.groups:
            check(group, strict=debugging())

    def settle(self) -> None:
        """Take back a forward pass that stopped between two layers (an exception, an interrupt), if there was one.

        Raises:
            InterruptedStepError: it had evicted tokens it would have to bring back, or layers that keep no pages have
                gone through it; `reset()` and feed the text again.
        """
        others = self._stateful()
        if others and any(group.plan is not None for group in self.groups):
            raise InterruptedStepError(
                f"an earlier forward pass stopped between two layers, and what {others[0]} has seen of it cannot be "
                "taken back; call cache.reset() and feed the text again"
            )
        seen = min(group.settle() for group in self.groups)
        ahead = [group for group in self.groups if group.seen > seen]
        for group in ahead:
            try:
                group.check_crop(group.seen - seen)
            except ConfigError as error:
                raise InterruptedStepError(
                    f"layers {group.layers} had finished the interrupted forward pass and evicted tokens; "
                    "call cache.reset() and feed the text again"
                ) from error
        for group in ahead:
            group.crop(group.seen - seen)
        self.context.ledger.crop(seen)

    def requantize(self, kv_bits: int | Mapping[str, int]) -> int:
        """Store the full pages with fewer bits from now on, those of the text so far too; the others stay as they are.

        It needs room for one layer's new keys or values. Not to be undone: what fewer bits do not say is gone.

        Args:
            kv_bits: as in `PageOptions`, for each of K and V at most what it has.

        Returns:
            Bytes that were given back; less than 0 if no page is full yet, and room for packed ones was made.

        Raises:
            ConfigError: more bits than pages have, bits that the head size does not allow, or a prefix store's pages,
                which other texts use too. Nothing has changed.
            InterruptedStepError: a forward pass is under way, or stopped between two layers; call `settle()` before.
            torch.OutOfMemoryError: there is no room. The cache can be read on, and this be called again.
        """
        if not self.context.between_steps:
            raise InterruptedStepError(
                "a forward pass is under way, or stopped between two layers; call cache.settle() before its pages are "
                "re-encoded"
            )
        options = replace(self.options, kv_bits=kv_bits)
        wanted = [options.codecs(group.policy) for group in self.groups]
        for group, codecs in zip(self.groups, wanted, strict=True):
            _check_requantize(group, codecs, kv_bits)
        before = self.nbytes
        self.context.forget_graph()
        self.context.decoders.clear()
        for group, codecs in zip(self.groups, wanted, strict=True):
            if codecs is not None and (group.codecs != codecs or group.arena.uneven):
                requantize(group, codecs)
        self.options = options
        self.context.relieve(f"full pages are stored with {kv_bits} bits")
        return before - self.nbytes

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back, in all layers or, if that is impossible, in none.

        Raises:
            ConfigError: a positive number, a token the shorter text needs was evicted, or a layer without pages keeps
                a state that cannot go back.
            InterruptedStepError: the last forward pass stopped between two layers, which only `settle()` can undo.
        """
        count = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        seen = max(group.seen for group in self.groups)
        if any(0 < at < seen for group in self.groups for at in group.progress.values()):
            raise InterruptedStepError("the last forward pass stopped between two layers; call cache.settle() first")
        for group in self.groups:
            group.check_crop(-count)
        others = [layer for layer in self._stateful() if not (layer.record_past and layer.is_croppable)]
        if count and others:
            raise ConfigError(
                "tokens_to_remove", count, f"0: the state of {others[0]} cannot go back; where it is a convolution's "
                "alone it can, after activate_past_recording() before the forward pass that is to be taken back",
            )  # fmt: skip
        super().crop(count)

    def _stateful(self) -> list[Any]:
        """Layers that keep a state of the text so far in no pages: linear attention, convolutions."""
        return [layer for layer in self.layers if isinstance(layer, StatefulLayer)]

    def __repr__(self) -> str:
        held = ", ".join(f"{len(g.layers)} layers: {g.policy}" for g in self.groups)
        return f"{type(self).__name__}(seen={self.get_seq_length()}, nbytes={self.nbytes}, {held})"


def attention_cache(cache: Any) -> PageCache | None:
    """Our cache inside what a model was given (an encoder-decoder's too), if it is one of ours."""
    inner = getattr(cache, "self_attention_cache", cache)
    return inner if isinstance(inner, PageCache) else None


_PAGED = (DynamicLayer, DynamicSlidingWindowLayer)


def window_of(layer: Any) -> int | None:
    """The sliding window of one of transformers' own dynamic layers; `None` for full attention."""
    return int(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else None


def _check_requantize(group: LayerGroup, codecs: Codecs | None, kv_bits: Any) -> None:
    """Raise unless the group's pages can be stored by `codecs` (`None`: 16 bits)."""
    if group.arena.shared:
        raise ConfigError("kv_bits", kv_bits, "unchanged: other texts read the pages of a prefix store")
    held, asked = _bits(group.codecs), _bits(codecs)
    if any(new > old for new, old in zip(asked, held, strict=True)):
        raise ConfigError("kv_bits", kv_bits, f"at most {held[0]} for K and {held[1]} for V, which the pages have")
    if codecs is not None:
        for storage in group.storages.values():
            codecs.check(storage.keys, storage.values)


def _bits(codecs: Codecs | None) -> tuple[int, int]:
    """Bits of full pages' K and V."""
    return (16, 16) if codecs is None else codecs.bits


def _group_stats(group: LayerGroup) -> dict[str, Any]:
    held = group.held()
    return {
        "layers": list(group.layers),
        "sinks": group.policy.sinks,
        "window": group.policy.most_held,
        "tokens_held": held,
        "tokens_evicted": sum(row.length for row in group.rows) - held,
        "bytes_held": group.arena.nbytes,
        "bytes_used": group.arena.bytes_of(group.arena.used) if group.storages else 0,
        "pages": {
            "total": sum(group.arena.capacity),
            "used": sum(group.arena.used),
            "shared": group.pool.shared + group.sealed.shared,
            "open": group.arena.used.open,
            "sealed": group.arena.used.sealed,
        },
        "kv_bits": dict(zip("kv", _bits(group.codecs), strict=True)),
    }
