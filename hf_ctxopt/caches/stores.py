"""The process's prefix stores by name. A `cache_config` is JSON, so live objects are named in it, never passed."""

from __future__ import annotations

import itertools
import threading
import weakref

from .store import PrefixStore

_lock = threading.RLock()
_stores: dict[str, PrefixStore] = {}
_unnamed: weakref.WeakValueDictionary[str, PrefixStore] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def store_named(name: str | None) -> PrefixStore:
    """The store of that name, made on its first use; a new one that nobody else sees for `None`."""
    with _lock:
        if name is None:
            store = PrefixStore(f"unnamed {next(_numbers)}")
            _unnamed[store.name] = store
            return store
        if name not in _stores:
            _stores[name] = PrefixStore(name)
        return _stores[name]


def stores() -> dict[str, PrefixStore]:
    """Every store of this process that has a name: look into it with `stats()`, empty it with `clear()`."""
    with _lock:
        return dict(_stores)


def drop_store(name: str) -> None:
    """Empty a store and forget its name; caches that use it keep their pages until they are gone."""
    with _lock:
        store = _stores.pop(name, None)
    if store is not None:
        store.clear()
