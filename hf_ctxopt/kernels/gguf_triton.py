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
        chunks: 64-weight pieces of a row that a program holds at a time, 16, 32 or 64.
        warps: warps of a program.
        ahead: a program has the weights of the one so many later fetched into the L2 cache; 0 for none.
    """

    tile: int
    chunks: int
    warps: int
    ahead: int = 0


# Type -> (bits, minimum)
_FORMATS = {
    "Q4_K": (4, True), "Q5_K": (5, True), "Q6_K": (6, False), "Q8_0": (8, False),
    "Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True),
}  # fmt: skip
AHEAD = 132  # a program for each multiprocessor of an H200
PROGRAMS = 256  # two for each of a large GPU's multiprocessors


def choose(type: str, rows: int, columns: int, outputs: int) -> Launch:
    """The launch for `rows` rows times a weight (outputs, columns), as was fastest on an H200.

    A program of one row has many outputs, which share the rounding of the activations, but not so many that a small
    weight leaves multiprocessors idle. Fetching ahead gains where a program holds whole rows and costs where it takes
    them in steps; Q4_K, whose programs have more outputs, loses by it on a large grid.
    """
    chunks = 16
    while chunks < 64 and 64 * chunks < columns:
        chunks *= 2
    tile = 16 if type == "Q4_K" and rows == 1 else 8
    while tile > 2 and -(-outputs // tile) * -(-rows // _taken(rows)) < PROGRAMS:
        tile //= 2
    whole = rows == 1 and 64 * chunks >= columns and type != "Q5_K"
    ahead = AHEAD if whole and (type != "Q4_K" or outputs <= 2 * AHEAD * tile) else 0
    return Launch(tile, chunks, chunks // 16, ahead)


def _taken(rows: int) -> int:
    """Rows of a program: they share the decoded weight, those left over cost as much as real ones."""
    return 1 if rows == 1 else 2 if rows == 2 else 4


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
    taken = _taken(rows)
    launch = launch or choose(type, rows, columns, outputs)
    kind = _KINDS[x.dtype]
    bits, affine = _FORMATS[type]
    x = x.contiguous()
    wide = type in ("Q4_K", "Q5_K")
    if x.data_ptr() % 16:  # a view into the middle of something
        x = x.clone()
    if packed.data_ptr() % 16:
        packed = packed.clone()
    if kind != 2:
        x = x.view(torch.int32)
    early = starts_early(x.device)
    even = outputs % launch.tile == 0
    grid = (-(-outputs // launch.tile), -(-rows // taken))  # a vocabulary's tiles outnumber the second dimension
    common = {"COLUMNS": columns, "KIND": kind, "TAKEN": taken, "TILE": launch.tile, "CHUNKS": launch.chunks,
              "EARLY": early, "EVEN": even, "ASM": ASM, "AHEAD": launch.ahead,
              "WARPS": launch.warps, "num_warps": launch.warps}  # fmt: skip
    if early:
        common["launch_pdl"] = True
    if wide:
        matmul_k[grid](x, packed.view(torch.int32), out, rows, outputs, BITS=bits, **common)
    elif type == "Q6_K":
        matmul_q6[grid](x, packed.view(torch.int16), out, rows, outputs, **common)
    else:
        matmul_flat[grid](x, packed.view(torch.int16), out, rows, outputs, BITS=bits, AFFINE=affine, **common)
    return out
