"""Capturing one function of token ids and positions as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .compat import CACHE_NAMES


class Capture:
    """A captured forward pass with its fixed inputs and outputs.

    Args:
        graph: the graph; anything with `replay()`.
        ids: `(batch, 1)`, read by the graph.
        positions: `(batch, 1)`, read by the graph.
        output: what the forward pass returned, overwritten by each replay.
        key: what the graph depends on besides the contents of its buffers.
    """

    def __init__(self, graph: Any, ids: Tensor, positions: Tensor, output: Any, key: tuple[Any, ...]) -> None:
        self._graph, self._ids, self._positions, self.key = graph, ids, positions, key
        # The cache holds its graph; a graph that held its cache would keep both alive.
        self._kind, self._caches = type(output), [name for name in output if name in CACHE_NAMES]
        self._fields = {name: value for name, value in output.items() if name not in CACHE_NAMES}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied cache has other storages

    def replay(self, ids: Tensor, positions: Tensor, base: int, cache: Any) -> Any:
        """Run the step.

        Args:
            ids: `(batch, 1)`.
            positions: `(batch, 1)` or `(1, 1)`, of the text.
            base: what the model's positions count from.
            cache: what the output names as its cache.

        Returns:
            The model's output, in tensors of its own.
        """
        self._ids.copy_(ids)
        self._positions.copy_(positions - base if base else positions)
        self._graph.replay()
        fields = tree_map_only(Tensor, Tensor.clone, self._fields)
        return self._kind(**fields, **dict.fromkeys(self._caches, cache))


def capture(
    body: Callable[[Tensor, Tensor], Any], ids: Tensor, positions: Tensor, key: tuple[Any, ...], warm: bool = False
) -> Capture:
    """Capture `body(ids, positions)`.

    Args:
        body: the forward pass; it must do device work only, and the same whatever its inputs hold.
        ids: `(batch, 1)`.
        positions: `(batch, 1)` or `(1, 1)`.
        key: see `Capture`.
        warm: whether to run `body` once before, where it compiles itself.

    Raises:
        RuntimeError: CUDA refuses to capture something that `body` does.
    """
    with torch.inference_mode(False):
        held_ids, held_positions = ids.clone(), positions.expand(ids.shape[0], 1).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(ids.device), _no_collection():
        stream, current = _side_stream(ids.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if warm:
                body(held_ids, held_positions)
                torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = body(held_ids, held_positions)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    return Capture(graph, held_ids, held_positions, output, key)


@cache
def _side_stream(device: torch.device) -> Any:
    """One stream for all captures of a device: cuBLAS keeps a workspace for every stream that it was ever used on."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: freeing somebody's CUDA tensor inside a capture would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
