"""Orders of rows that llama.cpp changes when it converts a model, and that reading a file undoes.

A row of a packed weight is a row of bytes, so an order of rows is undone without unpacking anything.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_to_halves(rows: int, heads: int) -> Tensor:
    """Order that brings q or k rows from llama.cpp's pairs (x0, y0, x1, y1 …) to transformers' halves (x…, y…).

    Source: llama.cpp `convert_hf_to_gguf.py`, `LlamaModel.permute`; transformers `LlamaTensorProcessor`.

    Args:
        rows: of the weight, heads * head size.
        heads: of q, or of k.

    Returns:
        int64 (rows,): `weight[order]` is transformers' weight.
    """
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def halves_to_rotary(rows: int, heads: int) -> Tensor:
    """Inverse of `rotary_to_halves`."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def bloom_interleaved(rows: int, heads: int) -> Tensor:
    """Order that brings Bloom's fused rows from q, k, v blocks to (q, k, v) head by head."""
    return torch.arange(rows).view(3, heads, rows // heads // 3).transpose(0, 1).reshape(-1)
