"""A mask that is not built until somebody asks about a position.

transformers' mask functions take the mask as a function of (batch, head, query index, key index). `LazyMask`
keeps the function and its arguments: the fused route asks only about the positions the cache holds; anything
else gets the dense mask. So does model code that reads the mask as the tensor it stands for (Doge adds to it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask, sliding_window_causal_mask_function


class LazyMask:
    """What `create_causal_mask` and its like return for models on the fused route.

    Args:
        **arguments: those of `transformers.masking_utils.sdpa_mask`.
    """

    ndim = 4  # to code that tells masks by their number of dimensions

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self._pads: list[int] | None = None
        self._sliding: bool | None = None
        self._full: Tensor | None = None

    def plain(self, pads: Sequence[int], reach: int | None = None) -> bool:
        """Whether it is causal attention over all but `pads` columns of left padding, which pages never hold.

        Args:
            pads: left-padding columns of each row.
            reach: columns that a query is compared with at most, its own included; `None` for all. A sliding window
                that wide hides nothing more.
        """
        if not self._causal(reach):
            return False
        padding: Tensor | None = self.arguments.get("attention_mask")
        if padding is None:
            return True
        if self._pads is None:
            rising = (padding[:, 1:] >= padding[:, :-1]).all(1)
            self._pads = torch.where(rising, (padding == 0).sum(1), -1).tolist()  # -1: zeros elsewhere
        return self._pads == list(pads)

    def _causal(self, reach: int | None) -> bool:
        function, window = self.arguments.get("mask_function"), self.arguments.get("local_size")
        if function is causal_mask_function:
            return True
        if reach is None or not isinstance(window, int) or window < reach:
            return False
        if self._sliding is None:
            self._sliding = _alike(function, sliding_window_causal_mask_function(window))
        return self._sliding

    def at(self, row: int, queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor | None:
        """Ask about single positions.

        Args:
            row: batch row.
            queries: `(queries, 1)`, columns of the queries in the text.
            keys: `(queries, keys)` or `(1, keys)`, the columns at which each query meets the keys.
            labels: `(1, keys)`, the keys' own columns, which padding is looked up by.

        Returns:
            Bool `(queries, keys)`; `None` if everything is visible.
        """
        if self.arguments.get("use_vmap"):
            seen = self._all_columns(int(max(queries.max(), keys.max())) + 1)[row, 0]
            seen = seen[queries - int(self.arguments["q_offset"]), keys]
        else:
            batch = torch.full((1, 1, 1, 1), row, device=queries.device)
            function: Callable[..., Tensor] = self.arguments["mask_function"]
            seen = function(batch, torch.zeros_like(batch), queries[None, None], keys[None, None])[0, 0]
            seen = seen.expand(queries.shape[0], labels.shape[1])
        padding: Tensor | None = self.arguments.get("attention_mask")
        if padding is not None:
            inside = labels < padding.shape[1]
            seen = seen & inside & padding[row, labels.clamp(max=padding.shape[1] - 1)].bool()
        return None if bool(seen.all()) else seen

    def _all_columns(self, columns: int) -> Tensor:
        """The whole dense mask without padding, for functions that only work through vmap."""
        if self._full is None:
            whole = {**self.arguments, "kv_length": columns, "kv_offset": 0, "attention_mask": None}
            self._full = sdpa_mask(**{**whole, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        if self._full is None:
            raise RuntimeError("sdpa_mask returned no mask although skipping was not allowed")
        return self._full

    def dense(self, eager: bool, dtype: torch.dtype) -> Tensor | None:
        """The mask as stock attention wants it: bool (or `None`) for sdpa, additive in `dtype` for eager."""
        if eager:
            return eager_mask(**{**self.arguments, "dtype": dtype})
        mask: Tensor | None = sdpa_mask(**self.arguments)
        return mask

    # ---- what the tensor would do: the attention function is then given a dense mask and counts the detour

    def _tensor(self) -> Tensor:
        """The bool mask that sdpa would be given, `(batch, 1, queries, keys)`; built even where sdpa needs none."""
        mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        if mask is None:
            raise RuntimeError("sdpa_mask returned no mask although skipping was not allowed")
        return mask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "arguments":  # an empty copy of this object has none
            raise AttributeError(name)
        return getattr(self._tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor()[index]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def plain(value: Any) -> Any:
            return value._tensor() if isinstance(value, LazyMask) else value

        return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})

    # accelerate moves every argument of a hooked module; compiled paths ask for contiguity
    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """Itself: nothing is built yet."""
        return self

    def contiguous(self) -> LazyMask:
        """Itself: nothing is built yet."""
        return self


def _alike(one: Any, other: Any) -> bool:
    """Whether two functions, made anew each step, are the same code over the same captured values."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return bool(one == other)
    cells = ([cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other))
    return all(map(_alike, *cells))


def lazy_mask(**arguments: Any) -> LazyMask:
    """The mask function registered for the fused route."""
    made = arguments.get("attention_mask")
    if isinstance(made, LazyMask):  # generate() has asked for the mask before the forward pass (static caches)
        return made
    return LazyMask(**arguments)
