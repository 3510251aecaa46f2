"""A linear layer and an embedding whose weight is packed in GGUF blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.dispatch import gguf_decoder
from .blocks import block_type, packed_columns
from .codecs import decode
from .matmul import gguf_matmul


class _Packed(nn.Module):
    """What both have in common.

    Args:
        rows: of the weight.
        columns: of the weight, a multiple of the type's block.
        type: key of `BLOCKS`.
        packed: `weight` is a uint8 parameter; if false it is a floating placeholder (rows, columns) that a loader
            replaces with the packed one (transformers 5.17 would cast what it reads to the placeholder's dtype).
    """

    weight: Tensor

    def __init__(self, rows: int, columns: int, type: str, packed: bool) -> None:
        nn.Module.__init__(self)  # past nn.Linear's, which would make a dense weight
        self.block_type = block_type(type).name
        width = packed_columns(columns, type)
        empty = torch.empty(rows, width, dtype=torch.uint8) if packed else torch.empty(rows, columns)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, (rows, columns)."""
        return _decoded(self.packed(), self.block_type, dtype)

    def packed(self) -> Tensor:
        """The blocks, uint8 (rows, bytes of a row). Raises `ConfigError` while nothing is loaded."""
        if self.weight.dtype != torch.uint8:
            raise ConfigError("weight", str(self.weight.dtype), "blocks in uint8: nothing has been loaded")
        return self.weight


def _exact_decoder(device: torch.device) -> Callable[[Tensor, str, torch.dtype], Tensor] | None:
    """A kernel whose values are `decode`'s bit for bit, as those of the CPU's are not; `None` where there is none."""
    return gguf_decoder(device) if device.type == "cuda" and not torch.compiler.is_compiling() else None


def _decoded(packed: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    """`decode`, by one kernel on a GPU."""
    fast = _exact_decoder(packed.device)
    if fast is None or not packed.numel():
        return decode(packed, type, dtype)
    return fast(packed.reshape(-1, packed.shape[-1]), type, dtype).view(*packed.shape[:-1], -1)


class GgufLinear(_Packed, nn.Linear):
    """`nn.Linear` with a packed weight; the bias stays as it was. One by type too: PEFT puts adapters on no other.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bias: whether there is one.
        type: key of `BLOCKS`.
        packed: see `_Packed`.

    Attributes:
        transposed: the dense weight in its place is (in_features, out_features), as GPT-2's `Conv1D` has it.
    """

    transposed = False

    def __init__(self, in_features: int, out_features: int, bias: bool, type: str, packed: bool = True) -> None:
        super().__init__(out_features, in_features, type, packed)
        self.in_features, self.out_features = in_features, out_features
        held = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", held)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in x's dtype."""
        out = gguf_matmul(x, self.packed(), self.block_type)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the block type."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, type={self.block_type}"


class GgufEmbedding(_Packed):
    """`nn.Embedding` with a packed weight: decodes the rows that are asked for.

    Args:
        num_embeddings, embedding_dim: as of `nn.Embedding`.
        type: key of `BLOCKS`.
        dtype: of the result; follows `module.to(dtype)` as a dense weight's would.
        scale: what the result is multiplied by (Gemma, BART).
        padding_idx: kept for whoever asks for it; its row is decoded like any other.
        packed: see `_Packed`.
        rounded: the scale is rounded to `dtype` first, as where transformers keeps it in a tensor (Gemma).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, type: str, dtype: torch.dtype, scale: float | None = None,
        padding_idx: int | None = None, packed: bool = True, rounded: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, type, packed)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype, self.scale, self.rounded = dtype, scale, rounded

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., embedding_dim)."""
        rows = _decoded(self.packed()[ids], self.block_type, self.dtype)
        if self.scale is None:
            return rows
        return rows * (torch.tensor(self.scale, dtype=self.dtype).item() if self.rounded else self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GgufEmbedding:
        """torch's door for `to`, `half` …: the blocks keep their dtype, what is decoded takes the new one."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        """As of `nn.Embedding`, and the block type."""
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.block_type}"
