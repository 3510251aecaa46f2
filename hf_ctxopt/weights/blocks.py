"""The GGUF block formats that weights are packed in.

A row of a weight is cut into blocks of `block` neighbours; a block is `nbytes` bytes: its fp16 scale(s), then the
codes. Numbers and sizes are those of ggml (`ggml.h`, `ggml-common.h`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class BlockType:
    """One block format.

    Args:
        name: upper-case name, as in llama.cpp.
        ggml: `GGMLQuantizationType` number in a `.gguf` file.
        block: weights per block.
        nbytes: bytes per block.
    """

    name: str
    ggml: int
    block: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.block


BLOCKS: dict[str, BlockType] = {
    row.name: row
    for row in (
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
    )
}


def block_type(name: str) -> BlockType:
    """The format called `name`. Raises `ConfigError` for another name."""
    if name not in BLOCKS:
        raise ConfigError("type", name, ", ".join(BLOCKS))
    return BLOCKS[name]


def packed_columns(columns: int, type: str) -> int:
    """Bytes of a row of `columns` weights. Raises `ConfigError` if they are no whole number of blocks."""
    row = block_type(type)
    if columns % row.block:
        raise ConfigError("columns", columns, f"a multiple of {row.block}, the block of {row.name}")
    return columns // row.block * row.nbytes


def packed_bytes(shape: Sequence[int], type: str) -> int:
    """Bytes of a tensor of `shape` (..., columns) packed as `type`."""
    return packed_columns(shape[-1], type) * math.prod(shape[:-1])
