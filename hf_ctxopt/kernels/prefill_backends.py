"""Who computes one piece of a prefill, in one table, with the reason for each choice.

All take `(heads, queries, dim)` queries and `(kv_heads, tokens, dim)` keys and values, and two windows aligned to the
lower right corner (see `prefill.attend_piece`); all return the output and the log of the softmax sum.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

QUERY_BLOCK = 256  # bounds the reference's float32 scores to (heads, 256, tokens)
_FLASH_HEAD = 256  # largest head size that FlashAttention 2 has kernels for

# (query, keys, values, scaling, left, right, softcap) -> (output, lse)
Attend = Callable[[Tensor, Tensor, Tensor, float, int, int, float | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """One way to compute a piece.

    Args:
        name: for reports.
        attend: the function.
        reason: why it is chosen where it can serve.
        refusal: why it cannot serve these tensors; `None` if it can.
    """

    name: str
    attend: Attend
    reason: str
    refusal: Callable[[Tensor, Tensor, Tensor, float | None], str | None]


def aten_flash(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, left: int, right: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 as torch ships it (`aten::_flash_attention_forward`): fewer key than query heads, both windows
    and the softmax sum, none of which `scaled_dot_product_attention` offers.
    """
    dim = values.shape[-1]
    states = [part.transpose(0, 1)[None] for part in (query, keys, _widen(values, keys.shape[-1]))]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *states, None, None, query.shape[1], keys.shape[1], 0.0, left < 0 and right == 0, False,
        scale=scaling, window_size_left=None if left < 0 else left, window_size_right=None if right < 0 else right,
    )  # fmt: skip
    return out[0, ..., :dim].transpose(0, 1), lse.view(query.shape[0], query.shape[1])


def flash_package(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, left: int, right: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The flash-attn package: the same kernels, and soft-capping."""
    from flash_attn import flash_attn_func

    dim = values.shape[-1]
    states = [part.transpose(0, 1)[None] for part in (query, keys, _widen(values, keys.shape[-1]))]
    out, lse, _ = flash_attn_func(
        *states, softmax_scale=scaling, causal=left < 0 and right == 0, window_size=(left, right),
        softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out[0, ..., :dim].transpose(0, 1), lse[0]


def reference(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, left: int, right: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Plain torch in float32, block by block: any device, dtype and head size."""
    heads, queries, _ = query.shape
    kv_heads, tokens, _ = keys.shape
    wide, mass = keys.to(torch.float32).transpose(1, 2), values.to(torch.float32)
    column = torch.arange(tokens, device=query.device)
    outs, sums = [], []
    for start in range(0, queries, QUERY_BLOCK):
        block = query[:, start : start + QUERY_BLOCK].to(torch.float32) * scaling
        scores = (block.reshape(kv_heads, -1, block.shape[-1]) @ wide).view(heads, block.shape[1], tokens)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        corner = torch.arange(start, start + block.shape[1], device=query.device)[:, None] + tokens - queries
        if right >= 0:
            scores = scores.masked_fill(column > corner + right, -torch.inf)
        if left >= 0:
            scores = scores.masked_fill(column < corner - left, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp_().view(kv_heads, -1, tokens)
        outs.append((weights @ mass).view(heads, block.shape[1], -1).to(query.dtype))
        sums.append(lse)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def _widen(values: Tensor, dim: int) -> Tensor:
    """Values with zero channels up to the keys' head size: FlashAttention wants both equal."""
    return functional.pad(values, (0, dim - values.shape[-1])) if values.shape[-1] < dim else values


def _flash_refusal(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> str | None:
    if not query.is_cuda:
        return "FlashAttention runs on CUDA only"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention has no {query.dtype} kernels"
    dim = keys.shape[-1]
    if dim % 8 or dim > _FLASH_HEAD or values.shape[-1] > dim:
        return f"FlashAttention has no kernels for heads of {dim} / {values.shape[-1]} channels"
    if torch.version.hip is not None or not _ampere(query.device):
        return "FlashAttention 2 needs an NVIDIA GPU of compute capability 8.0"
    return None


def _aten_refusal(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> str | None:
    return "torch's FlashAttention has no soft-capping" if softcap else _flash_refusal(query, keys, values, softcap)


def _package_refusal(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> str | None:
    refusal = _flash_refusal(query, keys, values, softcap)
    return refusal if refusal or importlib.util.find_spec("flash_attn") else "flash-attn is not installed"


@cache
def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


BACKENDS = (
    Backend("aten_flash", aten_flash, "FlashAttention 2 with nothing to install", _aten_refusal),
    Backend("flash_attn", flash_package, "the same kernels as torch's, but with soft-capping", _package_refusal),
    Backend("reference", reference, "serves everything, in float32", lambda *_: None),
)
"""In order of preference; the last serves everything."""


def choose(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> Backend:
    """The first backend that can serve these tensors."""
    return next(backend for backend in BACKENDS if backend.refusal(query, keys, values, softcap) is None)
