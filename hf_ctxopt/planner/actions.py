"""What a monitor can do about a full memory: drop kept prefixes, shrink windows, refuse new work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .monitor import Action, Monitor

LEAST_WINDOW = 256
SHARE = 4  # a fourth of a store's pages at a time


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
