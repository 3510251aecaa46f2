"""`ctx_prefix`: everything is kept, and equal beginnings of texts are computed once.

Source: RadixAttention (Zheng et al. 2023, arXiv 2312.07104), range priorities as in TensorRT-LLM
(`KvCacheRetentionConfig`).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import LongTensor, Tensor

from ..errors import CacheFullError
from ..models.layerwise import layer_values
from ..pages.admission import make_room
from ..pages.arena import Arena
from ..pages.budget import Budget
from ..pages.group import LayerGroup
from ..pages.plan import Pages
from ..pages.pool import KINDS, SEALED
from ..pages.rows import Row
from ..pages.wanted import wanted_pages
from ..policies.sink_window import SinkWindow
from .base import PageCache
from .found import Found
from .options import PageOptions, PrefixOptions
from .store import PrefixStore
from .stores import store_named


class PrefixCache(PageCache):
    """One call's rows over the pages of a store. Sliding layers of the model keep their own window.

    What is reused is decided by `integration/reuse.py`, which knows the tokens.

    Args:
        config: see `PageCache`.
        options: the cache's options.
        place: dtype and devices of the model: pages of another are not interchangeable.
        store: whose pages are used; `None` for the one that the options name.
        **rest: see `PageCache`.

    Attributes:
        namespace: model and salt, whose texts are found; `None` until the first prompt.
        kept: the caller passed the cache to `generate`, which then does not empty it.
        texts: token ids of each row, padding excluded; the first ones are held. `None` where they are unknown.
    """

    name = "ctx_prefix"
    options_type = PrefixOptions
    options: PrefixOptions

    def __init__(
        self, config: Any, options: PageOptions, *, place: tuple[str, tuple[str, ...]] = ("", ()),
        store: PrefixStore | None = None,
        **rest: Any,
    ) -> None:  # fmt: skip
        self.config, self.place = config, place
        self.namespace: Hashable = None
        self.texts: list[list[int]] | None = None
        self.kept = False
        self.store = store if store is not None else store_named(getattr(options, "store", None))
        super().__init__(config, options, **rest)
        self.lease = self.store.lease(self)
        self.prompt_tokens = self.reused_tokens = 0

    def policy(self, model_window: int | None, all_sliding: bool) -> SinkWindow:
        """Everything, or what the model's own window can still see."""
        return SinkWindow(window=model_window)

    def _pages(self, policies: Sequence[SinkWindow], arenas: list[Arena]) -> tuple[Budget, list[Arena]]:
        def made() -> list[Arena]:
            for arena in arenas:
                arena.shared = True
            return arenas

        config, horizons = self.context.config, [None if p.most_held is None else p.horizon for p in policies]
        heads = tuple(_shape(config, name) for name in _SHAPE)
        layout = (heads, tuple((arena.layers, p, arena.codecs) for arena, p in zip(arenas, policies, strict=True)),
                  self.options.page_size)  # fmt: skip
        description = repr((layout, self.place[0]))
        found = self.store.open(
            (layout, self.place), description, made, horizons, self.options.page_size, Budget(self.options.budget),
            Budget(self.options.cpu_budget), self.options.offload_priority,
        )  # fmt: skip
        return self.store.budget, found

    # ---- reuse

    def find(self, texts: Sequence[Sequence[int]]) -> list[Found]:
        """What the store has of each row's text. Begun pages count where they are not quantized.

        Pages in the host's memory come back. That may push out what was found for another row, so everything found is
        locked meanwhile, and looked up again.
        """
        found = [self._look(text) for text in texts]
        if not any(slot.away for one in found for slot in one.slots):
            return [self._on_device(one) for one in found]
        self.store.hold(self.lease, [*self.lease.nodes, *(one.node for one in found)])
        for one in found:
            self._bring_back(one)
        found = [self._on_device(self._look(text)) for text in texts]
        self.store.hold(self.lease, [one.node for one in found])
        return found

    def _look(self, text: Sequence[int]) -> Found:
        return self.store.find(self.namespace, text, partial=all(group.codecs is None for group in self.groups))

    def _on_device(self, found: Found) -> Found:
        """The beginning of what was found that lies on the device."""
        away = next((at for at, slot in enumerate(found.slots) if slot.away), None)
        if away is not None:
            return replace(found, slots=found.slots[:away], tail=None)
        return found if found.tail is None or not found.tail[0].away else replace(found, tail=None)

    def _bring_back(self, found: Found) -> None:
        """Move found pages from the host's memory to the device, if there is room."""
        needed = {}
        for index, group in enumerate(self.groups):
            kinds = [slot.kind(index) for slot in found.slots if slot.away]
            used = group.arena.used
            needed[id(group)] = Pages(used.open + kinds.count(KINDS[0]), used.sealed + kinds.count(KINDS[1]))
        try:
            make_room(self.groups, needed, 1)
        except CacheFullError:
            return
        self.store.bring_back(found)

    def adopt(self, found: Sequence[Found], seen: int) -> bool:
        """Begin with `seen` columns whose pages the store has.

        Args:
            found: what it has of each row: at least the row's tokens among those columns.
            seen: columns of the batch, left padding included.

        Returns:
            Whether that was possible; otherwise nothing has changed.
        """
        pads = self.groups[0].pads or [0] * len(found)
        rows = [[_row(group, index, one, pad, seen) for one, pad in zip(found, pads, strict=True)]
                for index, group in enumerate(self.groups)]  # fmt: skip
        self.store.hold(self.lease, [one.node for one in found])
        for group, group_rows in zip(self.groups, rows, strict=True):
            group.arena.share(page for row in group_rows for _, page in row.pages())
            group.rows = group_rows
        try:
            begun = seen and [[row.length % group.page_size != 0 for row in group.rows] for group in self.groups]
            copies = [sum(flags) for flags in begun or []]
            if any(copies):
                needed = {
                    id(group): Pages(group.arena.used.open + count, group.arena.used.sealed)
                    for group, count in zip(self.groups, copies, strict=True)
                }
                make_room(self.groups, needed, len(found))
        except CacheFullError:
            for group in self.groups:  # the padding stays known
                group.release(list(group.table.listed()))
                group.rows = []
            self.store.hold(self.lease, [])
            return False
        for group in self.groups:
            for row in group.rows:
                _own(group, row)
            group.seen, group.progress = seen, dict.fromkeys(group.layers, seen)
        return True

    def keep(self, row: int, tokens: Sequence[int], generated: int = 0) -> None:
        """Give a row's whole pages to the store.

        Args:
            row: index in the batch.
            tokens: the row's text, padding excluded.
            generated: how many of its last tokens were generated.
        """
        pages = self._whole_pages(row, len(tokens))
        if not pages:
            return
        count, size = len(pages), self.store.page_size
        retention = self.options.retention
        priorities, durations = retention.of_pages(size, count * size, len(tokens) - generated)
        node = self.store.keep(self.namespace, tokens[: count * size], pages, priorities, durations,
                               self.options.steps_to_next)  # fmt: skip
        self.store.hold(self.lease, [*self.lease.nodes, node])

    def _whole_pages(self, row: int, tokens: int) -> list[list[int | None]]:
        listed = [dict(group.rows[row].pages()) for group in self.groups]
        found: list[list[int | None]] = []
        for logical in range(tokens // self.store.page_size):
            pages = [
                pages.get(logical) if logical * self.store.page_size >= group.rows[row].whole else None
                for pages, group in zip(listed, self.groups, strict=True)
            ]
            for group, page in zip(self.groups, pages, strict=True):
                if page is None and group.policy.most_held is None:
                    return found
                if page is not None and page < SEALED and group.codecs and logical >= group.codecs.open_first:
                    return found  # full, but not yet as it will stay
            found.append(pages)
        return found

    def continues(self, namespace: Hashable, texts: Sequence[Sequence[int]]) -> bool:
        """Whether the tokens held are known to be those that `texts`, one for each row, begin with."""
        rows = self.groups[0].rows
        if self.texts is None or self.namespace != namespace or not len(rows) == len(texts) == len(self.texts):
            return False
        return all(
            row.length <= min(len(own), len(text)) and list(own[: row.length]) == list(text[: row.length])
            for row, own, text in zip(rows, self.texts, texts, strict=True)
        )

    def crop(self, tokens_to_remove: int) -> None:
        """See `PageCache.crop`."""
        super().crop(tokens_to_remove)
        if self.texts is not None:
            rows = self.groups[0].rows
            self.texts = [text[: row.length] for text, row in zip(self.texts, rows, strict=False)]

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """See `PageLayer.reorder_cache`."""
        self.texts = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `PageLayer.batch_repeat_interleave`."""
        self.texts = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `PageLayer.batch_select_indices`."""
        self.texts = None
        super().batch_select_indices(indices)

    def sibling(self, expected: int) -> PrefixCache:
        """An empty cache for one row of the same model over the same store."""
        twin = PrefixCache(self.config, self.options, place=self.place, expected=expected, store=self.store)
        twin.namespace = self.namespace
        twin.context.config = self.context.config
        return twin

    def count(self, prompt: int, reused: int) -> None:
        """A prompt of so many tokens has begun, of which so many need not be computed."""
        self.prompt_tokens += prompt
        self.reused_tokens += reused
        self.store.counts["prompt_tokens"] += prompt
        self.store.counts["reused_tokens"] += reused

    def release(self) -> None:
        """Give the pages back to the store; the cache is empty then."""
        with self.store.lock:
            for group in self.groups:
                group.reset()
            self.context.forget_graph()
            self.context.decoders.clear()
            self.store.hold(self.lease, [])

    def reset(self) -> None:
        """See `release`."""
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """A copy over the same store, whose rows list the same pages."""
        twin: PrefixCache = object.__new__(type(self))
        memo[id(self)] = twin
        for shared in (self.store, self.store.budget, self.config):
            memo[id(shared)] = shared
        with self.store.lock:
            for name, value in vars(self).items():
                if name != "lease":
                    setattr(twin, name, copy.deepcopy(value, memo))
            twin.lease = self.store.lease(twin)
            self.store.hold(twin.lease, self.lease.nodes)
        return twin

    def stats(self) -> dict[str, Any]:
        """What the cache holds and how it was read, with the store's figures."""
        own = {"prompt_tokens": self.prompt_tokens, "reused_tokens": self.reused_tokens,
               "not_reused": dict(self.context.not_reused), "store": self.store.stats()}  # fmt: skip
        return {**super().stats(), "prefix": own}

    def check_integrity(self) -> None:
        """Walk every table and the store's tree, and recompute every counter."""
        super().check_integrity()
        self.store.check_integrity()


_SHAPE = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def _shape(config: Any, name: str) -> Any:
    """A value of the config; all of them where layers differ in it."""
    values = layer_values(config, name)
    return tuple(values) if len(values) > 1 else next(iter(values), None)


def _row(group: LayerGroup, index: int, found: Found, pad: int, seen: int) -> Row:
    """A row over the found pages; a begun last page is still the store's own."""
    length = max(0, seen - pad)
    row = Row(pad, length, group.policy.horizon(length) if length else 0)
    row.sealed = length // group.page_size if group.codecs is not None else 0
    for pages in wanted_pages(group, length, row.lower):
        for logical in pages:
            page = found.slot(logical).pages[index]
            if page is None:
                raise ValueError(f"page {logical} of arena {index} was dropped")
            row.add(logical, page)
    return row


def _own(group: LayerGroup, row: Row) -> None:
    """Exchange a begun last page for a copy: the row will write into it."""
    logical = row.length // group.page_size
    page = row.page_of(logical) if row.length % group.page_size else None
    if page is None:
        return
    own = group.pool.take(1, page if page < SEALED else None)[0]
    for storage in group.storages.values():
        if page < SEALED:
            storage.copy_pages([(page, own)])
        else:
            storage.reopen(page, own)
    group.replace(row, logical, own)
