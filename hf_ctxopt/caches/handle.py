"""What `update()` returns on the fused route, in the places of K and V.

A handle carries no data: attention reads the pages through it. To code that does not know it, it behaves like
the dense tensor it stands for, by building that tensor (counted as a fallback).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import CacheContext
from .dense import dense_states
from .view import StepView


class KVHandle:
    """The keys, or the values, of one layer in one step.

    Args:
        view: the step's view, shared by both handles.
        context: the cache's counters.
        values: whether this handle stands for V.
    """

    def __init__(self, view: StepView, context: CacheContext, values: bool) -> None:
        self.view, self._context, self._values = view, context, values

    @property
    def _like(self) -> Tensor:
        return self.view.values if self._values else self.view.keys

    @property
    def shape(self) -> torch.Size:
        """`(batch, kv_heads, seq, head_dim)` of the tensor it stands for."""
        like = self._like
        return torch.Size((*like.shape[:2], self.view.length, like.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The states' dtype."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The states' device."""
        return self._like.device

    def dense(self, reason: str) -> Tensor:
        """The dense tensor, `(batch, kv_heads, seq, head_dim)`; `reason` is logged once and counted."""
        self._context.fall_back(reason)
        return dense_states(self.view)[int(self._values)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(f"the model reads Tensor.{name} of cached states"), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))

        def plain(value: Any) -> Any:
            if isinstance(value, KVHandle):
                return value.dense(f"the model calls torch.{name} on cached states")
            if isinstance(value, (list, tuple)):
                return type(value)(map(plain, value))
            return value

        return func(*plain(args), **{key: plain(value) for key, value in (kwargs or {}).items()})
