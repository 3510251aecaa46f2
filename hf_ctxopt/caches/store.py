"""A prefix store: pages of earlier texts under a radix tree, shared by all caches that name the store.

Source of the scheme: RadixAttention (Zheng et al. 2023, arXiv 2312.07104; SGLang, `mem_cache/radix_cache.py`). What a
hit is where some layers slide follows vLLM's rule for hybrid models: a sliding layer needs only its window.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from ..errors import ConfigError, IntegrityError, out_of_memory
from ..pages.arena import Arena
from ..pages.budget import Budget
from ..pages.compaction import compact
from ..pages.plan import Pages
from ..pages.pool import KINDS, kind_of
from ..pages.radix import Node, RadixTree
from .found import Found, Lease, Listed
from .slot import Slot

logger = logging.getLogger(__name__)

Horizon = Callable[[int], int]
"""Oldest token that the query at a token may see (see `pages/policy.py`)."""


class PrefixStore:
    """Pages and tree of one store.

    Args:
        name: what callers name it by.
        clock: seconds, for priorities that end.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.clock = name, clock
        self.lock = threading.RLock()
        self.layout: Hashable = None
        self.description, self.page_size = "", 0
        self.budget = Budget()
        self.host_budget, self.offload_priority, self.host_bytes = Budget(), 0, 0
        self.arenas: list[Arena] = []
        self.horizons: list[Horizon | None] = []
        self.tree: RadixTree[Slot] = RadixTree(1, clock=clock)
        self.counts: Counter[str] = Counter()
        self._leases: list[Lease] = []
        self._left: deque[Lease] = deque()

    # ---- who uses it

    def open(
        self,
        layout: Hashable,
        description: str,
        arenas: Callable[[], list[Arena]],
        horizons: Sequence[Horizon | None],
        page_size: int,
        budget: Budget,
        host_budget: Budget | None = None,
        offload_priority: int = 0,
    ) -> list[Arena]:
        """The arenas for caches of one layout; made anew if the store holds nothing of another.

        Args:
            layout: what must be equal for pages to be exchangeable: layers, heads, page size, codecs, dtype, devices.
            description: the same in words that are equal in every process and on every device.
            arenas: makes them.
            horizons: per arena, how far its layers look back; `None` for full attention.
            page_size: tokens of a page.
            budget: the newest caller's limit; what is kept beyond it, and not in use, goes.
            host_budget: likewise of the host's memory, for pages that must go; `None` for none of it.
            offload_priority: least priority of a page that is sent there.

        Raises:
            ConfigError: the store holds pages of another layout.
        """
        with self.lock:
            self.collect()
            if self.layout != layout:
                if any(arena.used != (0, 0) for arena in self.arenas):
                    allowed = "a name of its own for each model and page layout; `hf_ctxopt.stores()` lists the names"
                    raise ConfigError("store", self.name, allowed)
                self.layout, self.page_size, self.arenas = layout, page_size, arenas()
                self.horizons, self.description = list(horizons), description
                self.tree = RadixTree(page_size, clock=self.clock)
                for index, arena in enumerate(self.arenas):
                    arena.listings.append(Listed(self.tree, index))
                    arena.reclaim = self.reclaim
            self.budget.tokens, self.budget.nbytes = budget.tokens, budget.nbytes
            self.host_budget = host_budget if host_budget is not None else Budget()
            self.offload_priority = offload_priority
            self._keep_to_budget()
            return self.arenas

    def lease(self, cache: object) -> Lease:
        """A lease that ends with the cache, if not before."""
        lease = Lease(cache)
        self._leases.append(lease)
        weakref.finalize(cache, self._left.append, lease)
        return lease

    def hold(self, lease: Lease, nodes: Iterable[Node[Slot] | None]) -> None:
        """Lock these nodes for the lease, in place of those it held."""
        before, lease.nodes = lease.nodes, [node for node in nodes if node is not None]
        for node in lease.nodes:
            self.tree.lock(node)
        for node in before:
            self.tree.unlock(node)

    def end(self, lease: Lease) -> None:
        """The lease is over."""
        if lease in self._leases:
            self._leases.remove(lease)
            self.hold(lease, [])

    def collect(self, wait: bool = True) -> None:
        """End the leases and take back the pages of caches that are gone.

        Args:
            wait: for another thread that uses the store; otherwise it is left for later.
        """
        if not self.lock.acquire(blocking=wait):
            return
        try:
            while self._left:
                self.end(self._left.popleft())
            for arena in self.arenas:
                arena.collect()
        finally:
            self.lock.release()

    # ---- prefixes

    def find(self, namespace: Hashable, tokens: Sequence[int], partial: bool = True) -> Found:
        """What the store has of the text, but for its last token: one is always left to compute.

        Args:
            namespace: model and salt.
            tokens: the text.
            partial: whether a page that only begins like the text counts.
        """
        match = self.tree.match(namespace, tokens, limit=len(tokens) - 1)
        tail = match.partial if partial else None
        return Found(list(match.items), tail, self.page_size, match.node if match.items or tail else None)

    def keep(
        self,
        namespace: Hashable,
        tokens: Sequence[int],
        pages: Sequence[Sequence[int | None]],
        priorities: Sequence[int | None] | None = None,
        durations: Sequence[float | None] | None = None,
        steps_to_next: int | None = None,
    ) -> Node[Slot]:
        """Take whole pages of a text into the tree, which then is one more holder of those that it did not have.

        Args:
            namespace: model and salt.
            tokens: the text; whole pages of it.
            pages: per page of text, its page in each arena.
            priorities: per page, 0 to 100.
            durations: per page, seconds for which the priority holds.
            steps_to_next: turns of other agents until this text is expected to go on.
        """
        fresh = [Slot(list(per_arena)) for per_arena in pages]
        inserted = self.tree.insert(
            namespace, tokens, fresh, priorities=priorities, durations=durations, steps_to_next=steps_to_next,
            merge=self._merge,
        )  # fmt: skip
        for slot in fresh[inserted.existing :]:
            for arena, page in zip(self.arenas, slot.pages, strict=True):
                if page is not None:
                    arena.share([page])
        return inserted.node

    def _merge(self, old: Slot, new: Slot) -> Slot:
        """Pages of sliding layers that were dropped since come back, and those that were sent away."""
        if old.away:
            self.host_bytes -= old.host_bytes
            old.host, old.kinds, old.away = {}, [], False
        for index, page in enumerate(new.pages):
            if old.pages[index] is None and page is not None:
                old.pages[index] = page
                self.arenas[index].share([page])
        return old

    # ---- memory

    def reclaim(self, pages: int) -> bool:
        """Give up what was used longest ago until about so many pages are free; whether any was given up.

        Pages of sliding layers that no hit at the end of a kept text needs go first, then leaves of the tree.
        """
        self.collect()
        if self._drop_interior(pages):
            return True
        before = self.tree.resident_pages
        gone = self.tree.evict(pages, self._away if self.host_budget.nbytes is not None else None)
        self._forget(gone)
        self.counts["evicted_pages"] += sum(1 for slot in gone if not slot.away)
        return self.tree.resident_pages < before

    @property
    def movable(self) -> bool:
        """Whether pages may be moved now: every cache that uses them is between two steps."""
        return all(lease.movable for lease in self._leases)

    def compact(self) -> int:
        """Give back the memory of free pages; returns the bytes, 0 while a cache's step is under way.

        Called by the thread that runs the model.
        """
        with self.lock:
            self.collect()
            return sum(compact(arena) for arena in self.arenas) if self.movable else 0

    def _keep_to_budget(self) -> None:
        """The budget may have fallen: evict down to it, and give the memory back."""
        if not self._over([arena.capacity for arena in self.arenas]):
            return
        while (pages := self._over([arena.used for arena in self.arenas])) and self.reclaim(pages):
            pass
        self.compact()

    def _over(self, held: Sequence[Pages]) -> int:
        """By about how many pages of text so many pages of each arena exceed the budget."""
        if self.budget.tokens is not None:
            return max([0, *(sum(pages) - self.budget.tokens // self.page_size for pages in held)])
        if self.budget.nbytes is None:
            return 0
        excess = sum(arena.bytes_of(pages) for arena, pages in zip(self.arenas, held, strict=True))
        each = sum(arena.sealed_bytes or arena.page_bytes for arena in self.arenas)
        return max(0, -(-(excess - self.budget.nbytes) // max(1, each)))

    def _away(self, slot: Slot, priority: int) -> Slot | None:
        """A place in the host's memory for a page that must go, if it is worth one."""
        limit = self.host_budget.nbytes or 0
        size = sum(
            arena.bytes_of(Pages(kind_of(page) == KINDS[0], kind_of(page) == KINDS[1]))
            for arena, page in zip(self.arenas, slot.pages, strict=True)
            if page is not None
        )
        if priority < self.offload_priority or size > limit:
            return None
        while self.host_bytes + size > limit:
            gone = self.tree.evict_away(1)
            if not gone:
                return None
            self._forget(gone)
        try:
            slot.send_away(self.arenas)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.counts["host_refusals"] += 1
            logger.warning("store %s: the host has no memory for a page, which is dropped: %s", self.name, error)
            return None
        self.host_bytes += slot.host_bytes
        self.counts["sent_away_pages"] += 1
        return slot

    def bring_back(self, found: Found) -> None:
        """Move what lies in the host's memory to the device; the caller has made room and locked the node."""
        for slot in found.slots:
            if slot.away:
                self.host_bytes -= slot.host_bytes
                slot.bring_back(self.arenas)
                self.counts["brought_back_pages"] += 1
        if found.node is not None:
            self.tree.settle(found.node)

    def _drop_interior(self, wanted: int) -> int:
        dropped = 0
        for index, (arena, horizon) in enumerate(zip(self.arenas, self.horizons, strict=True)):
            if horizon is None:
                continue
            for node in sorted(self.tree.walk(), key=lambda node: node.last_use):
                first = node.end // self.page_size - len(node.items)
                needed = horizon(node.end) // self.page_size
                for slot in node.items[: max(0, needed - first)]:
                    page = slot.pages[index]
                    if page is None or arena.pool_of(page).references(page) > 1:
                        continue
                    slot.pages[index] = None
                    arena.release([page])
                    dropped += 1
                    if dropped >= wanted:
                        self.counts["dropped_pages"] += dropped
                        return dropped
        self.counts["dropped_pages"] += dropped
        return dropped

    def _forget(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.host_bytes -= slot.host_bytes
            for arena, page in zip(self.arenas, slot.pages, strict=True):
                if page is not None:
                    arena.release([page])

    def clear(self) -> None:
        """Forget every text. Pages that a living cache uses stay until it is gone; the memory goes if none does."""
        with self.lock:
            self.collect()
            for lease in self._leases:
                self.hold(lease, [])
            self._forget(slot for node in self.tree.walk() for slot in node.items)
            self.tree.clear()
            for arena in self.arenas:
                if arena.used == (0, 0):
                    arena.clear()

    # ---- figures

    @property
    def nbytes(self) -> int:
        """Bytes of the storages really held."""
        return sum(arena.nbytes for arena in self.arenas)

    def stats(self) -> dict[str, Any]:
        """What the store holds and has served, as plain JSON values. Never waits for another thread's `generate`."""
        self.collect(wait=False)
        prompt, reused = self.counts["prompt_tokens"], self.counts["reused_tokens"]
        return {
            "name": self.name,
            "prompt_tokens": prompt,
            "reused_tokens": reused,
            "hit_rate": reused / prompt if prompt else 0.0,
            "evicted_pages": self.counts["evicted_pages"],
            "dropped_pages": self.counts["dropped_pages"],
            "tokens": self.tree.tokens,
            "pages": self.tree.pages,
            "locked_pages": self.tree.locked_pages,
            "sent_away_pages": self.counts["sent_away_pages"],
            "brought_back_pages": self.counts["brought_back_pages"],
            "bytes_held": self.nbytes,
            "host_bytes": self.host_bytes,
            "bytes_used": sum(arena.bytes_of(arena.used) for arena in self.arenas),
        }

    def check_integrity(self) -> None:
        """Walk the tree and every table, and recompute every counter.

        Raises:
            IntegrityError: something disagrees.
        """
        with self.lock:
            self.collect()
            self.tree.check_integrity()
            for index, arena in enumerate(self.arenas):
                open_pages, sealed = arena.holders()
                found = arena.pool.violations(open_pages) + arena.sealed.violations(sealed)
                if found:
                    raise IntegrityError(f"arena {index}: {'; '.join(found)}")
            slots = [slot for node in self.tree.walk() for slot in node.items]
            if self.host_bytes != sum(slot.host_bytes for slot in slots):
                raise IntegrityError(f"{self.host_bytes} bytes in the host are counted wrongly")
            for node in self.tree.walk():
                if [slot.away for slot in node.items] != [at >= node.resident for at in range(len(node.items))]:
                    raise IntegrityError(f"the node at {node.start} does not know which of its pages are away")

    def __repr__(self) -> str:
        return f"PrefixStore({self.name!r}, tokens={self.tree.tokens}, nbytes={self.nbytes})"
