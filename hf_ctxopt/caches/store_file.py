"""Saving a prefix store's texts to a file, and taking them back (format: `pages/snapshot.py`).

A file names the model (fingerprint) and the layout of the pages it was made with. It is of no use to any other, and is
refused before memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheFullError, CorruptFileError
from ..pages.admission import make_room
from ..pages.group import LayerGroup
from ..pages.plan import Pages
from ..pages.pool import KINDS
from ..pages.radix import Node
from ..pages.snapshot import Stored, read, write
from ..pages.storage import LayerStorage
from .saved_texts import NAME, Text, check_kinds, check_tensors, shape_of, texts_in
from .slot import Slot
from .store import PrefixStore


def save(store: PrefixStore, path: str | Path) -> int:
    """Write all texts of a store; returns the pages written.

    Args:
        store: the store.
        path: the file; an earlier one of that name is replaced at once, or not at all.
    """
    with store.lock:
        store.collect()
        nodes = list(store.tree.walk())
        places = {id(node): at for at, node in enumerate(nodes)}
        slots = [slot for node in nodes for slot in node.items]
        body: dict[str, Any] = {
            "name": NAME, "layout": store.description, "page_size": store.page_size,
            "nodes": [
                {"parent": places.get(id(node.parent), -1), "namespace": node.namespace,
                 "pages": len(node.items), "priorities": node.priorities, "durations": node.durations}
                for node in nodes
            ],
            "kinds": ["".join(slot.kind(index) or "-" for slot in slots) for index in range(len(store.arenas))],
            "shapes": {},
        }  # fmt: skip
        tokens = [token for node in nodes for page in node.pages for token in page]
        tensors: dict[str, Tensor] = {"tokens": torch.tensor(tokens, dtype=torch.int64)}
        for index, arena in enumerate(store.arenas):
            for layer, storage in arena.storages.items():
                body["shapes"][f"{index}.{layer}"] = shape_of(storage)
                for kind in KINDS:
                    chosen = [slot for slot in slots if slot.kind(index) == kind]
                    for number, part in enumerate(storage.kept(kind) if chosen else ()):
                        tensors[f"{index}.{layer}.{kind}.{number}"] = torch.stack(
                            [slot.content(index, layer, number, part) for slot in chosen], dim=1
                        )
        write(path, tensors, body)
        return len(slots)


def load(
    store: PrefixStore, path: str | Path, fingerprint: str, groups: Sequence[LayerGroup],
    like: Callable[[int], Tensor],
) -> int:  # fmt: skip
    """Take the texts of a file into a store; returns the pages taken. What the store has already stays.

    Args:
        store: the store, opened for the layout of the model that asks.
        path: the file.
        fingerprint: of that model.
        groups: layer groups over the store's arenas.
        like: layer → an empty tensor of the dtype and on the device of its pages.

    Raises:
        CorruptFileError: the file is damaged, of another model or layout, or larger than the store's budget. The store
            is as it was, but for pages that went to make room.
    """
    found = read(path)
    with store.lock:
        store.collect()
        try:
            texts = list(texts_in(found, store, fingerprint))
            check_kinds(found, store)
            check_tensors(found, store)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CorruptFileError(str(path), str(error) or type(error).__name__) from error
        locked: list[Node[Slot]] = []
        try:  # what the store has already must not go to make room for the rest
            new: list[tuple[Text, int]] = []
            for text in texts:
                tokens = text.tokens
                match = store.tree.match(text.namespace, tokens)
                if match.items:
                    store.tree.lock(match.node)
                    locked.append(match.node)
                here = match.items[len(tokens) // store.page_size - text.count :]
                have = next((at for at, slot in enumerate(here) if slot.away), len(here))
                new.append((text, have))
            return _take(store, found, new, groups, like)
        finally:
            for node in locked:
                store.tree.unlock(node)


def _take(
    store: PrefixStore, found: Stored, new: list[tuple[Text, int]], groups: Sequence[LayerGroup],
    like: Callable[[int], Tensor],
) -> int:  # fmt: skip
    """Make room for the pages that the store lacks, and take them; `new` says how many of each text's it has."""
    wanted = [at for text, have in new for at in range(text.first + have, text.first + text.count)]
    kinds = found.body["kinds"]
    needed = {}
    for index, group in enumerate(groups):
        counts = [sum(kinds[index][at] == kind for at in wanted) for kind in KINDS]
        used = group.arena.used
        needed[id(group)] = Pages(used.open + counts[0], used.sealed + counts[1])
        if not _affordable(group, found.body["shapes"], index, Pages(*counts)):
            raise CorruptFileError(str(found.path), "its pages are more than the store's budget allows")
    _make_storages(groups, found.body["shapes"], like)
    try:
        make_room(groups, needed, 1)
    except CacheFullError as error:
        reason = f"its pages are more than the store's budget allows: {error}"
        raise CorruptFileError(str(found.path), reason) from error
    _insert(store, new, dict(zip(wanted, _filled(store, found, wanted), strict=True)))
    return len(wanted)


def _affordable(group: LayerGroup, shapes: dict[str, list[int]], index: int, pages: Pages) -> bool:
    """Whether the pages alone fit the budget; what others hold is seen to by `make_room`."""
    limit = group.budget
    if limit.tokens is not None:
        return sum(pages) * group.page_size <= limit.tokens
    if limit.nbytes is None or group.arena.storages:
        return True
    least = sum(heads * (k + v) for key, (heads, k, v) in shapes.items() if key.startswith(f"{index}."))
    bits = 16 if group.codecs is None else min(group.codecs.bits)
    return sum(pages) * group.page_size * least * bits // 8 <= limit.nbytes


def _make_storages(groups: Sequence[LayerGroup], shapes: dict[str, list[int]], like: Callable[[int], Tensor]) -> None:
    for index, group in enumerate(groups):
        arena = group.arena
        for layer in arena.layers:
            if layer not in arena.storages:
                heads, key_dim, value_dim = shapes[f"{index}.{layer}"]
                states = [like(layer).new_empty((0, heads, 0, dim)) for dim in (key_dim, value_dim)]
                arena.storages[layer] = LayerStorage(
                    states[0], states[1], arena.page_size, arena.pool.capacity, arena.codecs, arena.sealed.capacity
                )
                arena.storage_version += 1


def _filled(store: PrefixStore, found: Stored, wanted: list[int]) -> list[Slot]:
    """Slots with pages of the store, filled from the file; each page has one reference, the caller's."""
    slots = [Slot([None] * len(store.arenas)) for _ in wanted]
    try:
        _fill(store, found, wanted, slots)
    except BaseException:
        _give_back(store, slots)
        raise
    return slots


def _fill(store: PrefixStore, found: Stored, wanted: list[int], slots: list[Slot]) -> None:
    kinds = found.body["kinds"]
    with found.tensors() as file:
        for index, arena in enumerate(store.arenas):
            for kind, pool in zip(KINDS, (arena.pool, arena.sealed), strict=True):
                chosen = [(slot, at) for slot, at in zip(slots, wanted, strict=True) if kinds[index][at] == kind]
                if not chosen:
                    continue
                pages = pool.take(len(chosen), leave_room=False)
                rank = {at: n for n, at in enumerate(at for at, one in enumerate(kinds[index]) if one == kind)}
                ranks = [rank[at] for _, at in chosen]
                for (slot, _), page in zip(chosen, pages, strict=True):
                    slot.pages[index] = page
                for layer, storage in arena.storages.items():
                    for number, part in enumerate(storage.kept(kind)):
                        stored = file.get_tensor(f"{index}.{layer}.{kind}.{number}")[:, ranks]
                        part[:, [page - pool.first for page in pages]] = stored.to(part.device, part.dtype)


def _insert(store: PrefixStore, new: list[tuple[Text, int]], slots: dict[int, Slot]) -> None:
    try:
        for text, have in new:
            if have == text.count:
                continue
            tokens = text.tokens
            known = len(tokens) // store.page_size - text.count + have
            before = store.tree.match(text.namespace, tokens[: known * store.page_size]).items
            own = [slots[at] for at in range(text.first + have, text.first + text.count)]
            pages = [slot.pages for slot in [*before, *own]]
            quiet: list[None] = [None] * (len(pages) - text.count)
            store.keep(text.namespace, tokens, pages, [*quiet, *text.priorities], [*quiet, *text.durations])
    finally:
        _give_back(store, slots.values())


def _give_back(store: PrefixStore, slots: Iterable[Slot]) -> None:
    """Release the caller's reference of every page."""
    for slot in slots:
        for arena, page in zip(store.arenas, slot.pages, strict=True):
            if page is not None:
                arena.release([page])
