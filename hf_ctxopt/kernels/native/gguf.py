"""Products with packed weights by the compiled kernel of `gguf.cpp`; without it torch decodes whole weights."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from .build import NotBuilt, gguf_library

logger = logging.getLogger(__name__)

# Type -> (ggml's number, columns of a block, bytes of a block), as `weights/blocks.py` has them.
_FORMATS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip


def available() -> bool:
    """Whether there is a kernel; compiles it if need be, and says once why there is none."""
    try:
        gguf_library()
    except NotBuilt as reason:
        _say(str(reason))
        return False
    return True


@cache
def _say(reason: str) -> None:
    logger.warning("packed weights are decoded by torch on the CPU, which is many times slower: %s", reason)


def matmul(x: Tensor, packed: Tensor, type: str) -> Tensor:
    """`x @ weight.T` with the weight decoded in registers.

    Args:
        x: (rows, columns), floating, on the CPU.
        packed: uint8 (outputs, bytes of a row), contiguous.
        type: block type.

    Returns:
        (rows, outputs) in x's dtype; products are those of float32 to a rounding of 2^-23 of the largest of 32
        activations, sums are float32.

    Raises:
        ValueError: shapes that do not belong together.
    """
    number, block, nbytes = _FORMATS[type]
    (rows, columns), outputs = x.shape, packed.shape[0]
    if packed.shape[1] * block != columns * nbytes:
        raise ValueError(f"{columns} columns of {type} are no {packed.shape[1]} bytes")
    given, packed = x.to(torch.float32).contiguous(), packed.contiguous()
    out = torch.empty(rows, outputs)
    gguf_library().ctxopt_gguf_matmul(
        number, given.data_ptr(), packed.data_ptr(), rows, columns, outputs, torch.get_num_threads(), out.data_ptr()
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def decode(packed: Tensor, type: str) -> Tensor:
    """The weight in float32, to a rounding of each product and difference.

    Args:
        packed: uint8 (outputs, bytes of a row) on the CPU.
        type: block type.

    Returns:
        (outputs, columns).
    """
    number, block, nbytes = _FORMATS[type]
    packed = packed.contiguous()
    blocks = packed.numel() // nbytes
    out = torch.empty(packed.shape[0], packed.shape[1] // nbytes * block)
    gguf_library().ctxopt_gguf_decode(number, packed.data_ptr(), blocks, torch.get_num_threads(), out.data_ptr())
    return out
