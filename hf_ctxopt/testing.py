"""Helpers for tests and benchmarks of caches."""

from __future__ import annotations

from .caches.base import PageCache
from .caches.options import check_int
from .errors import ConfigError


def skip(cache: PageCache, tokens: int) -> None:
    """Make a cache believe that `tokens` more tokens were seen, and that all of them and the window were evicted.

    Only the sinks stay. What follows is placed `tokens` positions later, as at that point of a long stream.

    Args:
        cache: a cache that evicts (`ctx_sink`), already holding its sinks.
        tokens: how many.

    Raises:
        ConfigError: a negative number, or a cache that keeps everything, or an empty one.
    """
    check_int("tokens", tokens, 0)
    if all(group.policy.most_held is None for group in cache.groups):
        raise ConfigError("cache", cache.name, "a cache that evicts")
    if not cache.get_seq_length():
        raise ConfigError("cache", f"an empty {cache.name}", "a cache that holds its sinks already")
    if tokens:
        for group in cache.groups:
            group.skip(tokens)
