"""What a model that is loaded holds: bytes by part, with the packed weights of other projects and their scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def item_of(model: Any) -> int:
    """Bytes of an element of its keys and values."""
    dtype = getattr(model, "dtype", None)
    return int(dtype.itemsize) if dtype is not None and dtype.is_floating_point else 2


def held_bytes(model: Any) -> tuple[int, int, int]:
    """Bytes of the parameters and buffers on the model's device: layers, embedding, head; a tied matrix once."""
    device = next(
        (part.device for part in model.parameters() if part.device.type != "cpu"),
        next(model.parameters()).device,
    )
    seen: dict[int, int] = {}

    def count(parts: Any) -> int:
        total = 0
        for part in (held for whole in parts for held in _held(whole)):
            storage = part.untyped_storage()
            if part.device == device and storage.data_ptr() not in seen:
                seen[storage.data_ptr()] = storage.nbytes()
                total += storage.nbytes()
        return total

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = count(embedding.parameters()) if embedding is not None else 0
    last = count(head.parameters()) if head is not None else 0
    return count([*model.parameters(), *model.buffers(), *_states(model)]), first, last


def _held(part: Any) -> Iterator[Any]:
    """The tensors that hold a parameter's bytes: those of quanto and torchao wrap several."""
    if not hasattr(part, "__tensor_flatten__"):
        yield part
        return
    for name in part.__tensor_flatten__()[0]:
        yield from _held(getattr(part, name))


def _states(model: Any) -> list[Any]:
    """Scales that bitsandbytes and HQQ keep beside their packed weights."""
    found = []
    for part in model.parameters():
        state = getattr(part, "quant_state", None)
        nested = getattr(state, "state2", None)
        found += [getattr(state, "absmax", None), getattr(nested, "absmax", None)]
    for module in model.modules():
        meta = getattr(module, "meta", None)
        if isinstance(meta, dict):
            found += [meta.get("scale"), meta.get("zero")]
    return [part for part in found if hasattr(part, "untyped_storage")]
