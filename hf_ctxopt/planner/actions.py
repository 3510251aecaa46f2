"""What a monitor can do about a full memory, mildest first: drop kept prefixes, store pages with fewer bits, shrink
windows, refuse new work.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..caches.base import PageCache, attention_cache
from ..caches.options import check_int
from ..errors import ConfigError, CtxoptError, out_of_memory
from .monitor import Action, Monitor

logger = logging.getLogger(__name__)

LEAST_WINDOW = 256
SHARE = 4  # a fourth of a store's pages at a time
STEPS = (8, 4)  # bits of stored values, one step at a time


def drop_prefixes(stores: Callable[[], Iterable[Any]], share: int = SHARE) -> Action:
    """Drop a part of the pages that prefix stores keep and no running text uses, by priority and then by age.

    What is left is moved together, and the memory behind it given back: what it has done counts in bytes. A store
    whose caches are in the middle of a step is passed over.

    Args:
        stores: gives the `PrefixStore`s to look at, e.g. `lambda: hf_ctxopt.stores().values()`.
        share: one in so many pages of a store goes.

    Raises:
        ConfigError: `share` is not a whole number from 1 on.
    """
    check_int("share", share, 1)

    def act() -> int:
        freed = 0
        for store in stores():
            with store.lock:
                if store.movable:  # otherwise nothing would come back
                    before, pages = store.nbytes, store.stats()["pages"]
                    if pages:
                        store.reclaim(max(1, pages // share))
                    store.compact()
                    freed += max(0, before - store.nbytes)
        return freed

    return Action("drop_prefixes", act, again=True)


def seal_colder(caches: Callable[[], Iterable[Any]], steps: Sequence[int] = STEPS) -> Action:
    """Store the full pages of caches, all but the sinks and the page that is being written, with the next fewer bits.

    The caches with the most bits go first. Those that share their pages (`ctx_prefix`), and those that have no such
    page yet, are passed over. It cannot be undone, and may run again until the last of the `steps`.

    Args:
        caches: gives the caches to look at; those that are not ours are left alone.
        steps: bits per value, from more to fewer.

    Raises:
        ConfigError: no steps, steps that are not falling, or not bits of stored values.
    """
    given = list(steps) if isinstance(steps, Sequence) else []
    whole = all(type(step) is int and step in (8, 4, 2) for step in given)
    if not given or not whole or given != sorted(set(given), reverse=True):
        raise ConfigError("steps", steps, "one or more falling numbers of 8, 4 and 2")

    def act() -> int:
        found = list(_ours(caches))
        for most in sorted({_most_bits(cache) for cache in found}, reverse=True):
            freed = sum(_fewer_bits(cache, given) for cache in found if _most_bits(cache) == most)
            if freed:
                return freed
        return 0

    return Action("seal_colder", act, again=True)


def _ours(caches: Callable[[], Iterable[Any]]) -> Iterator[PageCache]:
    """Our caches among those that there are, also inside of an encoder-decoder's."""
    return (cache for given in caches() if (cache := attention_cache(given)) is not None)


def _most_bits(cache: PageCache) -> int:
    return max(cache.options.bits.values())


def _has_full_pages(cache: PageCache, bits: int | Mapping[str, int]) -> bool:
    """Whether any page would be stored with those bits: one that is full, behind those that stay open."""
    options = replace(cache.options, kv_bits=bits)
    for group in cache.groups:
        codecs = options.codecs(group.policy)
        first = 0 if codecs is None else codecs.open_first
        if group.sealed.used or any(row.open_pages(first, row.length // group.page_size) for row in group.rows):
            return True
    return False


def _fewer_bits(cache: PageCache, steps: Sequence[int]) -> int:
    """Bytes that the next step gives back in one cache, at least 1 where it is taken.

    0 where there is none, where it would store no page otherwise, or where it cannot be taken.
    """
    fewer = next((step for step in steps if step < _most_bits(cache)), None)
    if fewer is None:
        return 0
    new = {part: min(had, fewer) for part, had in cache.options.bits.items()}
    bits = new if len(set(new.values())) > 1 else fewer
    if not _has_full_pages(cache, bits):
        return 0
    before, options = cache.nbytes, cache.options
    try:
        cache.requantize(bits)
    except (CtxoptError, RuntimeError, MemoryError) as error:
        if not isinstance(error, CtxoptError) and not out_of_memory(error):
            raise
        logger.warning("pages stay as they are, or some of them: %s", error)
    return max(int(cache.options != options), before - cache.nbytes)


def shrink_windows(caches: Callable[[], Iterable[Any]], least: int = LEAST_WINDOW) -> Action:
    """Shrink the windows of `ctx_sink` caches to the sinks and `least` tokens. What leaves a window is forgotten.

    It may run again, for caches that were made since. Undone, a window grows again with the text; what was forgotten
    stays so.

    Args:
        caches: gives the caches to look at; those without a window of ours are left alone.
        least: tokens of the new windows.

    Raises:
        ConfigError: `least` is not a whole number from 1 on.
    """
    check_int("least", least, 1)
    shrunk: list[tuple[weakref.ref[Any], Any]] = []

    def act() -> int:
        count = 0
        for cache in _ours(caches):
            for group in cache.groups:
                policy: Any = group.policy
                if cache.evicts(policy) and (policy.window or 0) > least and policy.n_discard is None:
                    shrunk.append((weakref.ref(group), policy))
                    group.policy = replace(policy, window=least)
                    count += 1
        return count

    def undo() -> None:
        for reference, policy in shrunk:
            group = reference()
            if group is not None:
                group.policy = policy
        shrunk.clear()

    return Action("shrink_windows", act, undo, again=True)


def refuse_new_work(monitor: Callable[[], Monitor]) -> Action:
    """Clear `monitor.accepting`, for whoever admits work to ask.

    Args:
        monitor: gives the monitor that the action belongs to, which does not exist yet when the action is made.
    """

    def act() -> int:
        monitor().accepting = False
        return 1

    def undo() -> None:
        monitor().accepting = True

    return Action("refuse_new_work", act, undo)


def usual(
    caches: Callable[[], Iterable[Any]],
    stores: Callable[[], Iterable[Any]],
    monitor: Callable[[], Monitor],
    steps: Sequence[int] = STEPS,
) -> list[Action]:
    """All of them, in the order in which they cost the least.

    Args:
        caches: gives the caches in use.
        stores: gives the prefix stores, e.g. `lambda: hf_ctxopt.stores().values()`.
        monitor: gives the monitor that they belong to.
        steps: see `seal_colder`.
    """
    return [drop_prefixes(stores), seal_colder(caches, steps), shrink_windows(caches), refuse_new_work(monitor)]
