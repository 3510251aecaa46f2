"""Decoder layers through `torch.compile`, for as long as a step is captured.

Only whole layers are compiled, not the model: what is between them (masks, lengths, the cache) would be guarded by its
host numbers and compiled anew for every length. Inside a layer the cache and our attention break the graph, and what
lies around them is fused: norms, rotary embedding, residuals, activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class CompiledLayers:
    """The compiled forward of each class of decoder layers in a model.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._forwards: dict[type, Callable[..., Any]] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model's decoder layers run compiled. Layers with a `forward` of somebody else's keep it."""
        import torch._dynamo.config as config

        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        changed = [layer for layer in layers if "forward" not in vars(layer)]
        # One compilation must serve all layers, whatever their index.
        with config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            for layer in changed:
                layer.forward = functools.partial(self._forward(type(layer)), layer)
            try:
                yield
            finally:
                for layer in changed:
                    del layer.forward

    def _forward(self, kind: type[nn.Module]) -> Callable[..., Any]:
        if kind not in self._forwards:
            # One row's matrix products are bound by memory; tuned so, inductor writes them as reductions of its own,
            # which read weights nearer to the bus's speed than a library's and take neighbouring operations in.
            options: Any = {"coordinate_descent_tuning": True} if self._backend == "inductor" else None
            self._forwards[kind] = torch.compile(kind.forward, backend=self._backend, options=options)
        return self._forwards[kind]
