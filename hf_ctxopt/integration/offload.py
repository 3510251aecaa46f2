"""The input embedding and the head on the host: only hidden states travel.

A vocabulary of 128 k to 262 k tokens makes these two matrices a large part of a small card's memory, and a step reads
one row of the embedding for each token. With the embedding on the host, ids go there and hidden states come back. With
the head on the host, the last hidden states go there and logits come back: a matrix product on the CPU for each token,
for those who need the memory more than the time.

A step with a part on the host is not replayed as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, UnsupportedModelError
from ..planner.valid import HOST_PARTS
from .chunking import compute_device

HOST = torch.device("cpu")

logger = logging.getLogger(__name__)


class _Enter:
    """Forward pre-hook: moves the input to where the module's weight is."""

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_send(part, module.weight.device) if isinstance(part, Tensor) else part for part in args)


@dataclass
class _Leave:
    """Forward hook: moves the output to where the model computes."""

    device: torch.device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _send(output, self.device)


def _send(states: Tensor, device: torch.device) -> Tensor:
    return states.to(device)


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


@dataclass
class HostPart:
    """One part that was moved.

    Args:
        name: one of `HOST_PARTS`.
        device: where it came from.
        position: its place among its parent's modules, for the embedding, which is listed last while it is away.
    """

    name: str
    device: torch.device
    position: int | None = None


def parse_parts(value: Any) -> tuple[str, ...]:
    """The parts that `on_host` names, in the order of `HOST_PARTS`.

    Raises:
        ConfigError: it is not a sequence of names from `HOST_PARTS`.
    """
    allowed = f"a list of {' and '.join(repr(part) for part in HOST_PARTS)}"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError("on_host", value, allowed)
    given = list(value)
    if any(part not in HOST_PARTS for part in given):
        raise ConfigError("on_host", value, allowed)
    return tuple(part for part in HOST_PARTS if part in given)


def check_parts(model: Any, names: tuple[str, ...]) -> None:
    """Whether the parts can be moved; nothing is changed.

    Raises:
        ConfigError: the model is spread over devices by accelerate, whose hooks move inputs themselves.
        UnsupportedModelError: a part does not exist, or its weight is quantized.
    """
    if names and (getattr(model, "hf_device_map", None) or any(hasattr(m, "_hf_hook") for m in model.modules())):
        raise ConfigError("on_host", list(names), "[] for a model with a device_map: name the host there instead")
    for name in names:
        weight = getattr(_module(model, name), "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"the {name} of {type(model).__name__} cannot be moved to the host: it has no plain weight matrix"
            )


def to_host(model: Any, names: tuple[str, ...], moved: list[HostPart]) -> None:
    """Move the named parts, and hook them so that the model goes on as before.

    An embedding and a head that are one matrix move together or stay together: the GPU needs the matrix as long as one
    of them is there.

    Args:
        model: a transformers model that `check_parts` passed.
        names: of `HOST_PARTS`.
        moved: is told of every part as it is moved, for `from_host`; of none in a model that is on the host already.
    """
    device = compute_device(model)
    if not names or device == HOST:
        return
    if _tied(model) and len(names) < len(HOST_PARTS):
        logger.warning(
            "%s: embedding and head are one matrix; it stays on %s unless on_host names both",
            type(model).__name__,
            device,
        )
        return
    for name in names:
        module = _module(model, name)
        moved.append(HostPart(name, device, _list_last(model, module) if name == "embedding" else None))
        _move(module, HOST)
        module.register_forward_pre_hook(_Enter())
        module.register_forward_hook(_Leave(device))


def from_host(model: Any, parts: list[HostPart]) -> None:
    """Undo `to_host`, also on a copy of the model."""
    for part in parts:
        module = _module(model, part.name)
        for hooks, kind in ((module._forward_pre_hooks, _Enter), (module._forward_hooks, _Leave)):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                _handle(hooks, key).remove()
        _move(module, part.device)
        if part.position is not None:
            _list_at(model, module, part.position)


def _handle(hooks: Any, key: int) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    handle.id = key
    return handle


def _module(model: Any, name: str) -> Any:
    module = model.get_input_embeddings() if name == "embedding" else model.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no {name} to place on the host")
    return module


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def _parent(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    found = ((parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is module)
    return next(found)


def _list_last(model: nn.Module, module: nn.Module) -> int:
    """List a module last among its siblings; returns where it was.

    transformers takes the device of the first parameter for the model's device, and `generate` warns if the ids are
    elsewhere. The order has no other effect.
    """
    parent, key = _parent(model, module)
    position = list(parent._modules).index(key)
    parent._modules[key] = parent._modules.pop(key)
    return position


def _list_at(model: nn.Module, module: nn.Module, position: int) -> None:
    parent, key = _parent(model, module)
    order = [other for other in parent._modules if other != key]
    order.insert(position, key)
    for other in order:
        parent._modules[other] = parent._modules.pop(other)
