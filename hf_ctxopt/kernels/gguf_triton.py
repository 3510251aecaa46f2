"""Launches of the kernels that multiply a few rows by a weight in GGUF blocks.

The blocks stay in the order of the file: a saved weight is the one that was loaded, and an embedding can share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ctxopt.kernels.gguf_flat_triton import matmul_flat
from hf_ctxopt.kernels.gguf_k_triton import matmul_k
from hf_ctxopt.kernels.gguf_q6_triton import matmul_q6
from hf_ctxopt.kernels.paged_triton import INTERPRETED, starts_early

ROWS = 16  # more rows are served by a dequantized weight
ASM = not INTERPRETED and torch.version.cuda is not None
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Launch:
    """How a kernel is started.

    Args:
        tile: outputs of a program.
        chunks: 32-weight (flat types: 16-weight) pieces of a row that a program holds at a time.
        warps: warps of a program.
    """

    tile: int
    chunks: int
    warps: int


# Type -> (bits, minimum, columns of a block, weights of a chunk)
_FORMATS = {
    "Q4_K": (4, True, 256, 64), "Q5_K": (5, True, 256, 64), "Q6_K": (6, False, 256, 64),
    "Q8_0": (8, False, 32, 16), "Q4_0": (4, False, 32, 16), "Q4_1": (4, True, 32, 16),
    "Q5_0": (5, False, 32, 16), "Q5_1": (5, True, 32, 16),
}  # fmt: skip
# Outputs of a program for one row: enough to share the activations, few enough that 4,096 outputs fill a GPU.
_TILES = {"Q4_K": 4, "Q5_K": 4, "Q6_K": 4, "Q8_0": 4, "Q4_0": 4, "Q4_1": 4, "Q5_0": 4, "Q5_1": 4}


def choose(type: str, rows: int, columns: int) -> Launch:
    """The launch for so many rows; a program spans a row of 4,096 columns and takes few outputs, so that a weight of
    4,096 rows keeps every multiprocessor busy."""
    chunks = columns // _FORMATS[type][3]
    width = 64 if type.endswith("_K") else 128
    while width > 32 and width // 2 >= chunks:
        width //= 2
    return Launch(_TILES[type] if rows == 1 else 4, width, 2 if type in ("Q4_K", "Q5_K") else 4)


def matmul(x: Tensor, packed: Tensor, type: str, launch: Launch | None = None) -> Tensor:
    """`x @ weight.T` with the weight decoded in registers.

    Args:
        x: (rows, columns) bfloat16, float16 or float32.
        packed: uint8 (outputs, bytes of a row), contiguous.
        type: block type.
        launch: instead of `choose`'s.

    Returns:
        (rows, outputs) in x's dtype; sums are float32.
    """
    rows, columns = x.shape
    outputs = packed.shape[0]
    out = x.new_empty(rows, outputs)
    taken = 1 if rows == 1 else 2 if rows == 2 else 4
    launch = launch or choose(type, rows, columns)
    kind = _KINDS[x.dtype]
    bits, affine, block, _ = _FORMATS[type]
    x = x.contiguous()
    wide = type in ("Q4_K", "Q5_K")
    if kind != 2:
        if x.data_ptr() % 16:  # a view into the middle of something
            x = x.clone()
        x = x.view(torch.int32)
    early = starts_early(x.device)
    grid = (-(-outputs // launch.tile), -(-rows // taken))  # a vocabulary's tiles outnumber the second dimension
    common = {"COLUMNS": columns, "KIND": kind, "TAKEN": taken, "TILE": launch.tile, "CHUNKS": launch.chunks,
              "EARLY": early, "num_warps": launch.warps}  # fmt: skip
    if early:
        common["launch_pdl"] = True
    if wide:
        matmul_k[grid](x, packed.view(torch.int32), out, rows, outputs, BITS=bits, ASM=ASM, **common)
    elif type == "Q6_K":
        matmul_q6[grid](x, packed.view(torch.int16), out, rows, outputs, ASM=ASM, **common)
    else:
        matmul_flat[grid](x, packed.view(torch.int16), out, rows, outputs, BITS=bits, AFFINE=affine, **common)
    return out
