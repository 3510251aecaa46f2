"""A model's attention layers as the cache will group them: heads and widths of keys and values, and windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError
from ..models.layerwise import largest, layer_value
from ..weights.roles import Role, layer_of, role
from .configs import broken, reason


@dataclass(frozen=True)
class LayerShape:
    """The keys and values of the layers that keep the same tokens and have equal heads.

    Args:
        layers: how many they are.
        kv_heads: heads of keys and values.
        key_dim: channels of a key.
        value_dim: channels of a value.
        window: the model's own sliding window; `None` for full attention.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def token_bytes(self, item: int) -> int:
        """Bytes of a token over the layers, in elements of `item` bytes."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * item


def layer_shapes(text: Any, module: Any) -> tuple[tuple[LayerShape, ...], int]:
    """Layers of equal heads and windows together, as the cache will have them, and how many it does not page."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        stock = DynamicCache(config=text).layers or [DynamicLayer() for _ in range(int(text.num_hidden_layers))]
        windows = [int(x.sliding_window) if type(x) is DynamicSlidingWindowLayer else None for x in stock]
    except broken() as error:
        raise UnsupportedModelError(
            f"{text.model_type}: transformers makes no cache for it ({reason(error)})"
        ) from error
    measured = _projections(_own_parts(module, {text.model_type, module.config.model_type}))
    counted: dict[tuple[int, int, int, int | None], int] = {}
    others = 0
    for index, layer in enumerate(stock):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            others += 1
            continue
        key = (*_heads(text, index, measured.get(index)), windows[index])
        counted[key] = counted.get(key, 0) + 1
    if not counted:
        raise UnsupportedModelError(f"{text.model_type} has no attention layer whose keys and values pages can hold")
    return tuple(LayerShape(count, *key) for key, count in counted.items()), others


def _own_parts(module: Any, kinds: set[str]) -> Iterator[tuple[str, Any]]:
    """(name, part) of a model without those of other kinds in it: an image's encoder has numbered layers too."""
    from transformers.modeling_utils import PreTrainedModel

    foreign: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and part.config.model_type not in kinds:
            foreign.append(name + ".")
        elif not name.startswith(tuple(foreign)):
            yield name, part


def _projections(parts: Iterable[tuple[str, Any]]) -> dict[int, tuple[int, int, int]]:
    """Layer → rows of its key and value projections and the size of its heads, where the model has them apart."""
    found: dict[int, tuple[int, int, int]] = {}
    for name, part in parts:
        layer, size = layer_of(name + "."), getattr(part, "head_dim", None)
        if layer is None or layer in found or not isinstance(size, int):
            continue
        rows = {}
        for child, projection in part.named_children():
            kind = role(child)
            if kind in (Role.K, Role.V) and isinstance(getattr(projection, "out_features", None), int):
                rows[kind] = int(projection.out_features)
        if Role.K in rows:
            found[layer] = rows[Role.K], rows.get(Role.V, rows[Role.K]), size
    return found


def _heads(text: Any, index: int, measured: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Heads, channels of a key and channels of a value of one layer."""
    heads = int(layer_value(text, "num_attention_heads", index))
    if measured is not None and measured[0] % measured[2] == 0:
        kv_heads = measured[0] // measured[2]
        return kv_heads, measured[2], measured[1] // kv_heads
    named = (layer_value(text, name, index) for name in ("num_key_value_heads", "num_kv_heads"))
    own = next((count for count in named if count), heads)
    single = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    size = int(layer_value(text, "head_dim", index) or largest(text, "hidden_size") // heads)
    return 1 if single else int(own), size, size
