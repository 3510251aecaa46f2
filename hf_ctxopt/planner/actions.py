"""What a monitor can do about a full memory, mildest first: drop kept prefixes, store pages with fewer bits, shrink
windows, refuse new work.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError, CtxoptError
from .monitor import Action, Monitor

logger = logging.getLogger(__name__)

LEAST_WINDOW = 256
SHARE = 4  # a fourth of a store's pages at a time
STEPS = (8, 4)  # bits of stored values, one step at a time


def drop_prefixes(stores: Callable[[], Iterable[Any]], share: int = SHARE) -> Action:
    """Drop a part of the pages that prefix stores keep and no running text uses, by priority and then by age.

    Args:
        stores: gives the `PrefixStore`s to look at, e.g. `lambda: hf_ctxopt.stores().values()`.
        share: one in so many pages of a store goes.
    """

    def act() -> int:
        gone = 0
        for store in stores():
            with store.lock:
                pages = store.stats()["pages"]
                if pages:
                    store.reclaim(max(1, pages // share))
                    gone += pages - store.stats()["pages"]
        return gone

    return Action("drop_prefixes", act, again=True)


def seal_colder(caches: Callable[[], Iterable[Any]], steps: Sequence[int] = STEPS) -> Action:
    """Store the full pages of caches, all but the sinks and the page that is being written, with the next fewer bits.

    The caches with the most bits go first. Those that share their pages (`ctx_prefix`) are passed over. It cannot be
    undone, and may run again until the last of the `steps`.

    Args:
        caches: gives the caches to look at.
        steps: bits per value, from more to fewer.

    Raises:
        ConfigError: the steps are not falling, or not bits of stored values.
    """
    if list(steps) != sorted(set(steps), reverse=True) or not set(steps) <= {8, 4, 2}:
        raise ConfigError("steps", tuple(steps), "falling numbers of 8, 4 and 2")

    def act() -> int:
        found = list(caches())
        for most in sorted({_most_bits(cache) for cache in found}, reverse=True):
            freed = sum(_fewer_bits(cache, steps) for cache in found if _most_bits(cache) == most)
            if freed:
                return freed
        return 0

    return Action("seal_colder", act, again=True)


def _bits(cache: Any) -> dict[str, int]:
    bits = cache.options.kv_bits
    return dict(bits) if isinstance(bits, Mapping) else {"k": bits, "v": bits}


def _most_bits(cache: Any) -> int:
    return max(_bits(cache).values())


def _fewer_bits(cache: Any, steps: Sequence[int]) -> int:
    """Bytes that the next step gives back in one cache; 0 where there is none, or where it cannot be taken."""
    fewer = next((step for step in steps if step < _most_bits(cache)), None)
    if fewer is None:
        return 0
    new = {part: min(had, fewer) for part, had in _bits(cache).items()}
    before = int(cache.nbytes)
    try:
        cache.requantize(new if len(set(new.values())) > 1 else fewer)
    except (CtxoptError, MemoryError, torch.OutOfMemoryError) as error:
        logger.warning("pages stay as they are, or some of them: %s", error)
    return max(0, before - int(cache.nbytes))


def shrink_windows(caches: Callable[[], Iterable[Any]], least: int = LEAST_WINDOW) -> Action:
    """Shrink the windows of `ctx_sink` caches to the sinks and `least` tokens. What leaves a window is forgotten.

    Undone, a window grows again with the text; what was forgotten stays so.

    Args:
        caches: gives the caches to look at; those without a window of ours are left alone.
        least: tokens of the new windows.
    """
    shrunk: list[tuple[weakref.ref[Any], Any]] = []

    def act() -> int:
        count = 0
        for cache in caches():
            for group in cache.groups:
                policy = group.policy
                if cache.evicts(policy) and policy.window > least and policy.n_discard is None:
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

    return Action("shrink_windows", act, undo)


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
