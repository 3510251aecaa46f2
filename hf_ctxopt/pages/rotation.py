"""A fixed rotation of K and V before they are quantized: it spreads outliers over all channels.

Source: randomized Hadamard transform (QuIP#, Tseng et al. 2024, arXiv 2402.04396, section 3; QuaRot, Ashkboos et al.
2024, arXiv 2404.00456). Scores do not change when queries and keys are turned alike, and the weighted sum of turned
values is the turned sum, so nothing has to be turned back for each token.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.precision import without_autocast

_SEED = 0x5EED


@lru_cache(maxsize=32)
def rotation_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthogonal `(size, size)`: random signs, then Hadamard blocks of the largest power of two dividing `size`."""
    block = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(_SEED)) * 2 - 1
    blocks = torch.block_diag(*[hadamard / math.sqrt(block)] * (size // block))
    with torch.inference_mode(False):
        turn: Tensor = (signs[:, None] * blocks).to(device=device, dtype=dtype)
    return turn


def rotate_channels(states: Tensor, back: bool = False) -> Tensor:
    """`states` `(..., head_dim)` in the turned basis, or from it `back` to the model's."""
    matrix = rotation_matrix(states.shape[-1], states.device, states.dtype)
    with without_autocast(states.device):
        return states @ (matrix.T if back else matrix)
