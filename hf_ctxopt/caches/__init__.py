"""The caches, one file each. A new cache is one file and one line in `CACHES`."""

from __future__ import annotations

from .base import PageCache
from .paged import PagedCache
from .prefix import PrefixCache
from .priority import PriorityCache
from .sink import SinkCache

CACHES: dict[str, type[PageCache]] = {
    cache.name: cache for cache in (PagedCache, SinkCache, PriorityCache, PrefixCache)
}

__all__ = ["CACHES", "PageCache", "PagedCache", "PrefixCache", "PriorityCache", "SinkCache"]
