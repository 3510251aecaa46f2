"""Bytes of a model's weights on the device, by how they are stored.

A mix of GGUF blocks follows `weights/mixes.py`, with what it does not pack in the model's 16 bits. The formats of
other projects follow the table in `weights/others.py`: linear layers only, embedding, head and norms keep 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..errors import ConfigError
from ..weights.blocks import packed_bytes
from ..weights.matmul import SLAB_GPU
from ..weights.mixes import MIXES, tensor_type
from ..weights.others import OTHERS, other_bytes
from ..weights.roles import Role, role
from .facts import Matrix, ModelFacts

PLAIN, LOADED = "bf16", "loaded"
LINEAR = tuple(OTHERS)
SCHEMES = (PLAIN, *MIXES, *LINEAR)
_NF4_TABLES = 4 * (16 + 256 + 1)  # a layer's code, the code of its scales, and their offset


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights under one scheme.

    Args:
        scheme: its name.
        layers: everything but embedding and head.
        embedding: the input embedding, and the head where both are one matrix.
        head: a head of its own; 0 where it is tied.
        unpacked: bytes of a matrix, or of a slab of it, in 16 bits, which a prompt needs beside the packed ones; 0 if
            nothing is packed.
        read: bytes that a generated token reads.
    """

    scheme: str
    layers: int
    embedding: int
    head: int
    unpacked: int
    read: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.embedding + self.head


@lru_cache(maxsize=64)  # a search asks for the same few hundreds of times
def weight_bytes(facts: ModelFacts, scheme: str) -> WeightBytes:
    """Bytes of the weights of `facts` under `scheme`.

    Args:
        facts: the model.
        scheme: one of `SCHEMES`, or `"loaded"` for a model as it stands.

    Raises:
        ConfigError: unknown scheme, or `"loaded"` for a model that is not.
    """
    if scheme == LOADED:
        return _as_loaded(facts)
    if scheme not in SCHEMES:
        raise ConfigError("weights", scheme, f"one of {', '.join(SCHEMES)}")
    parts = {Role.EMBEDDING: 0, Role.HEAD: 0, Role.OTHER: 0}
    read = unpacked = 0
    for matrix in facts.matrices:
        kind = role(matrix.name)
        kind = kind if kind in parts else Role.OTHER
        size = _bytes(matrix, scheme, facts)
        parts[kind] += size
        if (not matrix.table and kind is not Role.EMBEDDING) or (kind is Role.EMBEDDING and facts.tied):
            read += int(size * facts.active) if _routed(matrix, facts) else size
        if kind is Role.OTHER and (scheme in MIXES and matrix.packable or scheme in LINEAR and matrix.linear):
            unpacked = max(unpacked, 2 * (min(matrix.numel, SLAB_GPU) if scheme in MIXES else matrix.numel))
    return WeightBytes(scheme, parts[Role.OTHER], parts[Role.EMBEDDING], parts[Role.HEAD], unpacked, read)


def _as_loaded(facts: ModelFacts) -> WeightBytes:
    if facts.loaded is None:
        raise ConfigError("weights", LOADED, f"one of {', '.join(SCHEMES)}: the model is not loaded")
    layers, embedding, head = facts.loaded
    # The shape of what is packed is not seen any more: the largest matrix of a layer is that of its feed-forward.
    unpacked = 2 * facts.hidden * facts.inner if facts.packed else 0
    return WeightBytes(LOADED, layers, embedding, head, unpacked, layers + (embedding if facts.tied else head))


def _routed(matrix: Matrix, facts: ModelFacts) -> bool:
    """Whether it is one expert's, or all experts' in one matrix: a token reads only those it is sent to."""
    stacked = facts.shape.experts > 1 and len(matrix.shape) == 3 and matrix.shape[0] == facts.shape.experts
    return stacked or ("expert" in matrix.name and "shared_expert" not in matrix.name)


def _bytes(matrix: Matrix, scheme: str, facts: ModelFacts) -> int:
    if scheme in LINEAR and matrix.linear and role(matrix.name) is not Role.HEAD:
        return _linear_bytes(matrix, scheme)
    if scheme in MIXES and matrix.packable:
        block = tensor_type(matrix.name, matrix.shape, scheme, facts.shape)
        if block is not None:
            return packed_bytes(matrix.shape, block)
    return 2 * matrix.numel


def _linear_bytes(matrix: Matrix, scheme: str) -> int:
    columns = matrix.shape[-1]
    size = other_bytes(matrix.numel // columns, columns, scheme)
    return size + _NF4_TABLES if scheme == "nf4" else size
