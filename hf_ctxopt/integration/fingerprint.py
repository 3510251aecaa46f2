"""Which model a page belongs to: its pages are useless to any other, and wrong.

The fingerprint covers every weight, adapters and their state, the config (rotary settings among it) and the dtype. It
is worked out from the weights' bytes once, and again when a weight was replaced or written.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .graph_rules import harmless

_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures")
_WIDTH, _ROWS = 4096, 256  # words of a row, and rows that are mixed at once
_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()
_names: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """A hexadecimal digest that is equal for equal models, in other processes too.

    A model with weights on the meta device (offloaded by accelerate), or with hooks of others on its modules, gets one
    of this process only. Weights that are written through `.data` look unchanged to torch and to this: `clear()` the
    stores that have seen the model.
    """
    hooks = _hooks(model)
    weights = _of_weights(model)
    return hashlib.sha256(" ".join([weights, *hooks]).encode()).hexdigest() if hooks else weights


def _of_weights(model: nn.Module) -> str:
    marks = tuple(_mark(tensor) for _, tensor in _weights(model)) + _adapters(model)
    known = _known.get(model)
    if known is not None and known[0] == marks:
        return known[1]
    digest = hashlib.sha256()
    digest.update(_config(model).encode())
    for state in _adapters(model):
        digest.update(repr(state).encode())
    for name, tensor in _weights(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_content(tensor) if not tensor.is_meta else _own_name(model).encode())
    found = digest.hexdigest()
    _known[model] = (marks, found)
    return found


def place_of(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Dtype, `torch.autocast`'s too, and devices of a model: pages of two places are not interchangeable."""
    devices = sorted({str(tensor.device) for _, tensor in _weights(model)})
    kinds = sorted({torch.device(device).type for device in devices})
    cast = [f" autocast {torch.get_autocast_dtype(kind)}" for kind in kinds if torch.is_autocast_enabled(kind)]
    return "".join([str(getattr(model, "dtype", None)), *cast]), tuple(devices)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    kept = set(model.state_dict(keep_vars=True)) if any(True for _ in model.buffers()) else set()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    """Changes whenever the tensor is replaced or written."""
    return id(tensor), tensor.data_ptr() if not tensor.is_meta else 0, 0 if tensor.is_inference() else tensor._version


def _adapters(model: nn.Module) -> tuple[object, ...]:
    """Which adapters (PEFT) act, and how strongly."""
    found = []
    for name, module in model.named_modules():
        active, off = getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
        if isinstance(active, list | tuple) and isinstance(off, bool):  # a method of the same name on whole models
            scaling = sorted(getattr(module, "scaling", {}).items())
            merged = tuple(getattr(module, "merged_adapters", ()))
            found.append((name, tuple(active), off, tuple(scaling), merged))
    return tuple(found)


def _hooks(model: nn.Module) -> list[str]:
    """Hooks that may change what a layer computes (steering vectors, say); each has a name of this process's own."""
    return [
        f"{name} {_own_name(hook)}"
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not harmless(hook)
    ]


def _own_name(thing: object) -> str:
    try:
        return _names.setdefault(thing, uuid.uuid4().hex)
    except TypeError:  # no weak reference to it, or no hash: it is never the same again
        return uuid.uuid4().hex


def _config(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if config is not None else {}
    for name in _VOLATILE:
        values.pop(name, None)
    return json.dumps([type(model).__name__, values], sort_keys=True, default=str)


def _content(tensor: Tensor) -> bytes:
    """Sums over all bytes that change with any single one of them and with the order.

    Words are mixed one to one before they are summed, and the sums' weights are odd, so a word's change never cancels.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    wide = flat[: flat.numel() // 8 * 8].view(torch.int64) if flat.numel() >= 8 else flat[:0].view(torch.int64)
    whole = wide.numel() // _WIDTH * _WIDTH
    sums = [flat[wide.numel() * 8 :].to(torch.int64)]
    if whole:
        rows, columns = [], torch.zeros(_WIDTH, dtype=torch.int64, device=wide.device)
        for block in wide[:whole].view(-1, _WIDTH).split(_ROWS):
            mixed = _mixed(block)
            rows.append(mixed.sum(1))
            columns += mixed.sum(0)
        sums += [_weighted(torch.cat(rows)), _weighted(columns)]
    sums.append(_weighted(_mixed(wide[whole:])))
    return torch.cat([part.flatten().cpu() for part in sums]).numpy().tobytes()


def _mixed(words: Tensor) -> Tensor:
    """Words, each exchanged for another one that depends on all its bits (the finalizer of MurmurHash3, shortened)."""
    mixed = words * -49064778989728563
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    return mixed.mul_(-4265267296055464877)


def _weighted(values: Tensor) -> Tensor:
    weights = (torch.arange(values.numel(), device=values.device) * 2 + 1) * 2654435761
    return (values * weights).sum()[None]
