"""A `.gguf` file opened for reading: metadata, and tensors as views of the mapped file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, CorruptFileError, CtxoptError
from .blocks import BLOCKS
from .codecs import decode
from .gguf_header import Header, TensorPlace, read_header
from .mixes import MIXES

_PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
# llama.cpp's `llama_ftype`; one that was guessed when the file was read has a bit more.
FILE_TYPES = {2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
               17: "Q5_K_M", 18: "Q6_K"}  # fmt: skip
_GUESSED = 1024
# Where the fp16 numbers of a block begin: scale, and minimum or scale of the minima.
_HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
           "Q6_K": (208,)}  # fmt: skip


class GgufFile:
    """A checked file. Nothing of the tensors is read before it is asked for, and then only by the page.

    Args:
        path: the file.

    Raises:
        CorruptFileError: see `read_header`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.header: Header = read_header(path)

    @property
    def metadata(self) -> Mapping[str, object]:
        return self.header.metadata

    @property
    def tensors(self) -> Mapping[str, TensorPlace]:
        return self.header.tensors

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def mix(self) -> str | None:
        """The mix that it says it is, or the one named after the type of most of its weights; `None`: not packed."""
        counts: dict[str, int] = {}
        for place in self.tensors.values():
            if place.type in BLOCKS:
                counts[place.type] = counts.get(place.type, 0) + math.prod(place.shape)
        if not counts:
            return None
        said = self.metadata.get("general.file_type")
        if isinstance(said, int) and said % _GUESSED in FILE_TYPES:
            return FILE_TYPES[said % _GUESSED]
        most = max(counts, key=lambda type: counts[type])
        return next(mix for mix, base in MIXES.items() if base == most)

    def check_finite(self, name: str) -> None:
        """Raises `CorruptFileError` if a value or a block's scale is infinite or NaN: kernels do not agree on it."""
        place = self._find(name)
        if place.type in BLOCKS:
            blocks = self.packed(name).view(-1, BLOCKS[place.type].nbytes)
            # The upper byte of an fp16 number: all bits of the exponent are set.
            odd = any(bool((blocks[:, at + 1] & 0x7C == 0x7C).any()) for at in _HALVES[place.type])
        elif place.type in _PLAIN and _PLAIN[place.type].is_floating_point:
            odd = not all(math.isfinite(end) for end in self.dense(name).aminmax())
        else:
            return
        if odd:
            raise CorruptFileError(
                self.header.path, f"the tensor {name} ({place.type}) has values that are not finite"
            )

    def packed(self, name: str) -> Tensor:
        """The tensor's bytes, uint8 (..., bytes of a row): a view of the file. Raises `ConfigError` if it has none."""
        place = self._find(name)
        flat = torch.frombuffer(self.header.data, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
        return flat.view(*place.shape[:-1], place.row_bytes)

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor's values in `dtype` (default: its own, float32 for packed ones). Plain tensors are views.

        Raises:
            ConfigError: no such tensor.
            CtxoptError: its type has no decoder here and the package `gguf` is missing.
        """
        place = self._find(name)
        if place.type in BLOCKS:
            return decode(self.packed(name), place.type, dtype or torch.float32)
        plain = _PLAIN.get(place.type)
        values = self.packed(name).view(plain) if plain is not None else _decode_by_gguf(self.packed(name), place.type)
        return values if dtype is None else values.to(dtype)

    def _find(self, name: str) -> TensorPlace:
        if name not in self.tensors:
            raise ConfigError("tensor", name, f"one of the {len(self.tensors)} tensors of {self.header.path}")
        return self.tensors[name]


def _decode_by_gguf(packed: Tensor, type: str) -> Tensor:
    gguf = need_gguf()
    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[type]))


def need_gguf() -> Any:
    """The package `gguf`. Raises `CtxoptError` with its install line if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise CtxoptError("this needs the package gguf: pip install 'gguf>=0.10'") from error
    return gguf
