"""What the file of a prefix store says of its texts, checked against the store that asks before anything is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..pages.pool import KINDS
from ..pages.snapshot import Stored
from ..pages.storage import LayerStorage
from ..policies.priority import check_duration, check_priority
from .store import PrefixStore

NAME = "hf_ctxopt prefix store, 1"


@dataclass(frozen=True)
class Text:
    """One node of a file: its own tokens behind those of `parent`, and which of the file's pages are its own."""

    parent: Text | None
    namespace: tuple[tuple[str, str], ...]
    own: list[int]
    first: int
    count: int
    priorities: list[int]
    durations: list[float | None]

    @property
    def tokens(self) -> list[int]:
        """All tokens up to its end; made anew, because together those of a long chain would be its square."""
        parts, node = [self.own], self.parent
        while node is not None:
            parts.append(node.own)
            node = node.parent
        return [token for part in reversed(parts) for token in part]


def texts_in(found: Stored, store: PrefixStore, fingerprint: str) -> Iterator[Text]:
    """The file's nodes of this model, parents first."""
    body = found.body
    if body["name"] != NAME:
        raise ValueError("not a file of a prefix store")
    if (body["layout"], body["page_size"]) != (store.description, store.page_size):
        raise ValueError("made with another page layout (page_size, kv_bits, dtype or model shape)")
    nodes, size = body["nodes"], store.page_size
    total = sum(node["pages"] for node in nodes)
    dtype, shape = found.shapes["tokens"]
    if dtype != torch.int64 or shape != (total * size,) or any(len(kinds) != total for kinds in body["kinds"]):
        raise ValueError("tokens, pages and nodes do not fit together")
    if len(body["kinds"]) != len(store.arenas):
        raise ValueError("made with other layer groups")
    with found.tensors() as file:
        tokens: list[int] = file.get_tensor("tokens").tolist()
    read: list[Text] = []
    first, ours = 0, 0
    for at, node in enumerate(nodes):
        parent, count = node["parent"], node["pages"]
        if not -1 <= parent < at or count < 1:
            raise ValueError(f"node {at} does not hang on an earlier one")
        _check_worth(at, count, node["priorities"], node["durations"])
        namespace = tuple((str(key), str(value)) for key, value in node["namespace"])
        before = read[parent] if parent >= 0 else None
        if before is not None and before.namespace != namespace:
            raise ValueError(f"node {at} is of another namespace than the one it hangs on")
        own = tokens[first * size : (first + count) * size]
        read.append(Text(before, namespace, own, first, count, node["priorities"], node["durations"]))
        if dict(namespace).get("model") == fingerprint:
            ours += 1
            yield read[at]
        first += count
    if nodes and not ours:
        raise ValueError("saved with another model (its fingerprint differs)")


def _check_worth(at: int, count: int, priorities: list[Any], durations: list[Any]) -> None:
    """One priority and one duration for each page of a node."""
    if len(priorities) != count or len(durations) != count:
        raise ValueError(f"node {at} has {len(priorities)} priorities and {len(durations)} durations")
    try:
        for priority, duration in zip(priorities, durations, strict=True):
            check_priority("priority", priority)
            check_duration("duration", duration)
    except ConfigError as error:
        raise ValueError(f"node {at}: {error}") from error


def check_kinds(found: Stored, store: PrefixStore) -> None:
    """Every page is of a kind that its arena has; full-attention layers have them all."""
    both = zip(store.arenas, store.horizons, found.body["kinds"], strict=True)
    for arena, horizon, kinds in both:
        allowed = {KINDS[0]} | ({KINDS[1]} if arena.codecs is not None else set()) | ({"-"} if horizon else set())
        if not set(kinds) <= allowed:
            raise ValueError(f"pages of the kinds {sorted(set(kinds) - allowed)}")


def check_tensors(found: Stored, store: PrefixStore) -> None:
    """Exactly the tensors that the nodes need, in the shapes of the model's layers."""
    expected = {"tokens"}
    for index, arena in enumerate(store.arenas):
        for layer in arena.layers:
            heads, key_dim, value_dim = found.body["shapes"][f"{index}.{layer}"]
            kept = LayerStorage.kept_shapes((heads, key_dim, value_dim), arena.page_size, arena.codecs)
            held = arena.storages.get(layer)
            if held is not None and shape_of(held) != [heads, key_dim, value_dim]:
                raise ValueError(f"layer {layer} has other heads")
            for kind in KINDS:
                count = found.body["kinds"][index].count(kind)
                for number, shape in enumerate(kept.get(kind, ()) if count else ()):
                    name = f"{index}.{layer}.{kind}.{number}"
                    expected.add(name)
                    if found.shapes[name][1] != (shape[0], count, *shape[1:]):
                        raise ValueError(f"tensor {name!r} has another shape than its pages")
    if set(found.shapes) != expected:
        raise ValueError("tensors are missing or too many")


def shape_of(storage: LayerStorage) -> list[int]:
    """`[kv_heads, key_dim, value_dim]` of a layer, as a file has them."""
    return [storage.keys.shape[0], storage.keys.shape[-1], storage.values.shape[-1]]
