"""Activations times a packed weight, by whatever serves their device and number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import ConfigError
from ..kernels.dispatch import GGUF_ROWS, gguf_decoder, gguf_kernel
from .blocks import block_type
from .codecs import decode

# Weights decoded at a time where many rows share them: 1 MB of float32 on a CPU, which stays in its cache, 64 MB of
# bfloat16 on a GPU.
SLAB_CPU, SLAB_GPU = 1 << 18, 1 << 25


def gguf_matmul(x: Tensor, packed: Tensor, type: str) -> Tensor:
    """`x @ weight.T`.

    Args:
        x: (..., columns), floating.
        packed: uint8 (outputs, bytes of a row), contiguous, on x's device.
        type: key of `BLOCKS`.

    Returns:
        (..., outputs) in x's dtype.

    Raises:
        ConfigError: activations that are not floating, as where a model casts them to the weight's dtype; of other
            columns than the weight.
    """
    if not x.is_floating_point():
        raise ConfigError("activations", str(x.dtype), "a floating dtype; exclude this layer from packing")
    row = block_type(type)
    columns = packed.shape[-1] // row.nbytes * row.block
    if x.shape[-1] != columns:
        raise ConfigError("columns of the activations", int(x.shape[-1]), f"{columns}, those of the weight")
    rows = x.reshape(-1, columns)
    out = opaque_matmul(rows, packed, type) if torch.compiler.is_compiling() else _matmul(rows, packed, type)
    return out.view(*x.shape[:-1], packed.shape[0])


def _matmul(rows: Tensor, packed: Tensor, type: str) -> Tensor:
    kernel = gguf_kernel(rows.device)
    served = rows.shape[0] <= GGUF_ROWS and rows.dtype != torch.float64  # kernels sum in float32
    if kernel is not None and served and not (torch.is_grad_enabled() and rows.requires_grad):
        return kernel(rows, packed, type)
    return decoded_matmul(rows, packed, type)


# Inside torch.compile the product is one operator whose inside is not traced: Triton's analysis of what a kernel
# writes fails on inline assembly and takes every argument, the weight too, for written. What lies around it is fused.
@torch.library.custom_op("hf_ctxopt::gguf_matmul", mutates_args=())
def opaque_matmul(rows: Tensor, packed: Tensor, type: str) -> Tensor:
    """`rows` (rows, columns) times a packed weight; see `gguf_matmul`."""
    return _matmul(rows, packed, type)


@opaque_matmul.register_fake
def _shape(rows: Tensor, packed: Tensor, type: str) -> Tensor:
    return rows.new_empty(rows.shape[0], packed.shape[0])


@torch.library.custom_op("hf_ctxopt::gguf_matmul_back", mutates_args=())
def _opaque_back(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    return _back(grad, packed, type)


@_opaque_back.register_fake
def _back_shape(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    row = block_type(type)
    return grad.new_empty(grad.shape[0], packed.shape[1] // row.nbytes * row.block)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, packed, ctx.type = inputs
    ctx.save_for_backward(packed)


def _opaque_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    return _opaque_back(grad, *ctx.saved_tensors, ctx.type), None, None


opaque_matmul.register_autograd(_opaque_gradient, setup_context=_keep)


def decoded_matmul(x: Tensor, packed: Tensor, type: str) -> Tensor:
    """The reference: `x` (rows, columns) times the decoded weight, a slab of outputs at a time.

    Differentiable in `x`; a slab is decoded again on the way back, not kept.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Decoded.apply(x, packed, type)  # type: ignore[no-untyped-call]
        return result
    out = None
    for first, weight in _slabs(packed, type, x.dtype):
        part = linear(x, weight)
        if len(weight) == packed.shape[0]:
            return part
        out = x.new_empty(len(x), packed.shape[0]) if out is None else out
        out[:, first : first + len(weight)] = part
    return x.new_empty(len(x), 0) if out is None else out


def _slabs(packed: Tensor, type: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    row = block_type(type)
    columns = packed.shape[1] // row.nbytes * row.block
    step = max(1, (SLAB_GPU if packed.is_cuda else SLAB_CPU) // max(1, columns))
    fast = gguf_decoder(packed.device)
    for first in range(0, packed.shape[0], step):
        slab = packed[first : first + step]
        yield first, decode(slab, type, dtype) if fast is None else fast(slab, type, dtype)


def _back(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    """`grad` (rows, outputs) times the decoded weight."""
    row = block_type(type)
    wide = torch.promote_types(grad.dtype, torch.float32)  # hundreds of slabs: bfloat16 would round each sum
    total = grad.new_zeros(len(grad), packed.shape[1] // row.nbytes * row.block, dtype=wide)
    for first, weight in _slabs(packed, type, grad.dtype):
        total += grad[:, first : first + len(weight)] @ weight
    return total.to(grad.dtype)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(context, x, packed, type):  # type: ignore[no-untyped-def]
        context.save_for_backward(packed)
        context.type = type
        return decoded_matmul(x, packed, type)

    @staticmethod
    def backward(context, grad):  # type: ignore[no-untyped-def]
        (packed,) = context.saved_tensors
        return _back(grad, packed, context.type), None, None
