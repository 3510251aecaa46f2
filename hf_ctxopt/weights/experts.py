"""The experts of a mixture, which transformers keeps as two parameters of three dimensions, with packed weights.

Each expert's rows are packed like those of a linear; a token's experts are decoded, or multiplied packed, one by one.
Source of the computation: transformers `integrations/moe.py`, `use_experts_implementation`, in its plain layout (gate
rows above up rows, no transposes and no biases), which Mixtral, the Qwen mixtures, DeepSeek, Granite and most others
share. Others stay dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .blocks import BLOCKS, packed_columns
from .codecs import decode
from .matmul import gguf_matmul

PARTS = ("gate_up_proj", "down_proj")
_LAYOUT = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}


def is_experts(module: nn.Module) -> bool:
    """Whether `GgufExperts` can take the place of `module`."""
    own = dict(module.named_parameters())
    return (
        set(own) == set(PARTS)
        and all(part.dim() == 3 for part in own.values())
        and all(getattr(module, name, value) is value for name, value in _LAYOUT.items())
        and callable(getattr(module, "_apply_gate", None))
    )


class GgufExperts(nn.Module):
    """Experts with one or both of their parameters packed.

    Args:
        source: the module whose place it takes. Its parameters, activation and plain attributes are taken over;
            `PARTS` are packed one by one, by `pack` or `expect`.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        plain = set(vars(self))
        self.__dict__.update({name: value for name, value in vars(source).items() if name not in plain})
        for name, child in source.named_children():
            self.add_module(name, child)
        for name in PARTS:
            self.register_parameter(name, nn.Parameter(getattr(source, name), requires_grad=False))
        self.source_class: Any = type(source)
        self.block_types: dict[str, str] = {}
        self.train(source.training)

    def expect(self, part: str, type: str, packed: bool) -> None:
        """Prepare `part` for a loader: an empty packed parameter on the default device, or, to be packed by the
        loader, the floating one as it is (see `linear.py`)."""
        self.block_types[part] = type
        if packed:
            *outer, columns = getattr(self, part).shape
            empty = torch.empty(*outer, packed_columns(columns, type), dtype=torch.uint8)
            setattr(self, part, nn.Parameter(empty, requires_grad=False))

    def pack(self, part: str, type: str, packed: Tensor) -> None:
        """Put blocks in the place of `part`: uint8 (experts, rows, bytes of a row)."""
        self.block_types[part] = type
        setattr(self, part, nn.Parameter(packed, requires_grad=False))

    def dequantize(self, part: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter, (experts, rows, columns)."""
        weight: Tensor = getattr(self, part)
        type = self.block_types.get(part)
        return weight.to(dtype) if type is None else decode(weight, type, dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, channels), with each token's experts and their shares (tokens, k), to (tokens, channels)."""
        out = torch.zeros_like(hidden_states)
        experts = len(self.gate_up_proj)
        for expert in top_k_index.unique().tolist():
            if expert >= experts:  # transformers' mark for an expert on another device
                continue
            token, place = torch.where(top_k_index == expert)
            inner = self._project(hidden_states[token], "gate_up_proj", expert)
            inner = self.source_class._apply_gate(self, inner)
            result = self._project(inner, "down_proj", expert) * top_k_weights[token, place, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out

    def _project(self, x: Tensor, part: str, expert: int) -> Tensor:
        weight: Tensor = getattr(self, part)[expert]
        type = self.block_types.get(part)
        if type is None:
            return nn.functional.linear(x, weight)
        if weight.dtype != torch.uint8:
            raise ConfigError(part, str(weight.dtype), "blocks in uint8: nothing has been loaded")
        return gguf_matmul(x, weight, type)

    def extra_repr(self) -> str:
        """Experts and block types."""
        return f"experts={len(self.gate_up_proj)}, types={self.block_types}"


def experts_part(model: nn.Module, name: str) -> tuple[str, Any, str] | None:
    """(name of the experts, the module, part) if `name` is a parameter of experts, packed or not; else `None`."""
    owner, _, part = name.rpartition(".")
    if part not in PARTS:
        return None
    module = model.get_submodule(owner)
    return (owner, module, part) if isinstance(module, GgufExperts) or is_experts(module) else None


def packed_type(module: nn.Module, parameter: str) -> str | None:
    """Block type of a parameter of a packed module of ours; `None` for others."""
    if isinstance(module, GgufExperts):
        return module.block_types.get(parameter)
    type = getattr(module, "block_type", None)
    return type if parameter == "weight" and type in BLOCKS else None
