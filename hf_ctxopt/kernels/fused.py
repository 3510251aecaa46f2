"""What a decode step's small operations compute: RMS norms and rotary embeddings, as transformers' models write them.

Each is eight to ten kernels in eager torch and one here (`fused_triton.py`). These functions are the meaning: they
repeat transformers' operations with every rounding, so that a module can be recognized by comparing bits.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class NormForm(IntEnum):
    """Where a weight enters an RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) whose sums are float32."""

    ROUNDED = 0  # weight * norm.to(dtype): LlamaRMSNorm and most others
    PLUS_ONE = 1  # (norm * (1 + weight)).to(dtype): Gemma
    FLOAT = 2  # (weight * norm).to(dtype): OLMo 2


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """The norm over the last dimension.

    Args:
        x: (..., channels).
        weight: (channels,), in x's dtype.
        eps: added to the mean of squares.
        form: where the weight enters.

    Returns:
        (..., channels) in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == NormForm.ROUNDED:
        return weight * normed.to(x.dtype)
    factor = 1.0 + weight.float() if form == NormForm.PLUS_ONE else weight
    return (normed * factor).to(x.dtype)


def rotary(query: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of whole heads, whose pairs are channels (0, n/2), (1, n/2 + 1) ….

    Args:
        query: (batch, heads, seq, head_dim).
        keys: (batch, kv_heads, seq, head_dim).
        cos, sin: (1 or batch, seq, head_dim), in the same dtype.

    Returns:
        Both, turned.
    """
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + _half_turned(query) * sin, keys * cos + _half_turned(keys) * sin


def _half_turned(states: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return torch.cat((-states[..., half:], states[..., :half]), dim=-1)
