"""The attention function `"ctxopt"`: reads pages through handles, and steps aside for everything else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..caches.dense import dense_states
from ..caches.handle import KVHandle
from ..kernels.precision import without_autocast
from ..kernels.sdpa import without_cudnn
from .mask import LazyMask


def ctxopt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | LazyMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' `AttentionInterface` calls it.

    Args:
        module: the attention layer.
        query: `(batch, heads, queries, key_dim)`.
        key: a handle on our caches' pages, or a tensor `(batch, kv_heads, seq, key_dim)`.
        value: likewise.
        attention_mask: a `LazyMask`, a dense mask, or `None`.
        scaling: factor on the scores; default `key_dim ** -0.5`.
        dropout: probability, in training.
        **kwargs: `softcap`, `s_aux`, `sliding_window`, `position_bias`, `output_attentions` … as the model has them.

    Returns:
        `(batch, queries, heads, value_dim)` and the attention weights where they exist, else `None`.
    """
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        # A model may change one of the two before attention (DiffLlama splits V): only that one is dense by then.
        key, value = (_tensor(part) for part in (key, value))
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    reason = _detour(attention_mask, dropout, kwargs)
    if reason is not None:
        dense = key.dense(reason), dense_states(value.view)[1]
        return stock_attention(module, query, *dense, attention_mask, scaling, dropout, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    mask = attention_mask if isinstance(attention_mask, LazyMask) else None
    with without_autocast(query.device):  # torch's own functions would cast the query to what the pages hold as well
        out = key.view.attend(query.to(key.dtype), mask, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def _tensor(states: Tensor | KVHandle) -> Tensor:
    """The states as a tensor, built from the pages where they are still a handle."""
    return states.dense("the model changes K or V before attention") if isinstance(states, KVHandle) else states


def _detour(mask: Tensor | LazyMask | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why the fused route cannot serve this call; `None` if it can."""
    if kwargs.get("position_bias") is not None:
        return "the model adds a position bias"
    if kwargs.get("output_attentions"):
        return "output_attentions asks for the attention weights"
    if isinstance(mask, Tensor):
        return "a dense attention mask was passed"
    if dropout:
        return "attention dropout is on"
    return None


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    mask: Tensor | LazyMask | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model would have done without us: sdpa, or its own eager function where sdpa cannot serve it."""
    # position_bias: transformers 5.17's sdpa ignores the argument, every eager function that is given one adds it.
    special = ("softcap", "s_aux", "position_bias")
    eager = any(kwargs.get(name) is not None for name in special) or bool(kwargs.get("output_attentions"))
    function: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
    if eager:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
    if isinstance(mask, LazyMask):
        mask = mask.dense(eager and function is not sdpa_attention_forward, query.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    with without_cudnn(query):
        return function(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
