"""Activations times a packed weight, by whatever serves their device and number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.dispatch import GGUF_ROWS, gguf_kernel
from .blocks import block_type
from .codecs import decode

# Weights decoded at a time where many rows share them: 4 MB of float32 on a CPU, 64 MB of bfloat16 on a GPU.
SLAB_CPU, SLAB_GPU = 1 << 20, 1 << 25


def gguf_matmul(x: Tensor, packed: Tensor, type: str) -> Tensor:
    """`x @ weight.T`.

    Args:
        x: (..., columns), floating.
        packed: uint8 (outputs, bytes of a row), contiguous, on x's device.
        type: key of `BLOCKS`.

    Returns:
        (..., outputs) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    kernel = gguf_kernel(x.device)
    if kernel is not None and len(rows) <= GGUF_ROWS and not (torch.is_grad_enabled() and x.requires_grad):
        out = kernel(rows, packed, type)
    else:
        out = decoded_matmul(rows, packed, type)
    return out.view(*x.shape[:-1], packed.shape[0])


def decoded_matmul(x: Tensor, packed: Tensor, type: str) -> Tensor:
    """The reference: `x` (rows, columns) times the decoded weight, a slab of outputs at a time.

    Differentiable in `x`; a slab is decoded again on the way back, not kept.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Decoded.apply(x, packed, type)  # type: ignore[no-untyped-call]
        return result
    out = x.new_empty(len(x), packed.shape[0])
    for first, weight in _slabs(packed, type, x.dtype):
        out[:, first : first + len(weight)] = linear(x, weight)
    return out


def _slabs(packed: Tensor, type: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    row = block_type(type)
    columns = packed.shape[1] // row.nbytes * row.block
    step = max(1, (SLAB_GPU if packed.is_cuda else SLAB_CPU) // max(1, columns))
    for first in range(0, packed.shape[0], step):
        yield first, decode(packed[first : first + step], type, dtype)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(context, x, packed, type):  # type: ignore[no-untyped-def]
        context.save_for_backward(packed)
        context.type = type
        return decoded_matmul(x, packed, type)

    @staticmethod
    def backward(context, grad):  # type: ignore[no-untyped-def]
        (packed,) = context.saved_tensors
        total = None
        for first, weight in _slabs(packed, context.type, grad.dtype):
            part = grad[:, first : first + len(weight)] @ weight
            total = part if total is None else total + part
        return total, None, None
