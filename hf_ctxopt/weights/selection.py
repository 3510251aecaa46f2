"""Which modules of a model are packed, and as what."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .blocks import BLOCKS, packed_columns
from .experts import PARTS, GgufExperts, experts_part, is_experts
from .linear import GgufEmbedding, GgufLinear
from .mixes import MIXES, tensor_type
from .precise import left_dense
from .roles import Role, kept, role
from .shapes import shape_of
from .ties import tied_groups

logger = logging.getLogger(__name__)
LARGE = 1 << 20  # weights of a matrix that is worth a word
_ENDS = {Role.HEAD: 0, Role.EMBEDDING: 1}  # whose type counts among modules that share a tensor, first to last


@dataclass(frozen=True)
class Choice:
    """What to pack.

    Args:
        mix: key of `MIXES`.
        include: regular expressions; only modules whose name one of them is found in are packed. `None`: all.
        exclude: regular expressions of modules that stay as they are.
        overrides: regular expression -> block type, instead of the mix's; the first that is found counts.

    Raises:
        ConfigError: unknown mix or type, a pattern that does not compile.
    """

    mix: str
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ConfigError("mix", self.mix, ", ".join(MIXES))
        for name in ("include", "exclude", "overrides"):
            patterns = getattr(self, name)
            if patterns is None:
                continue
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ConfigError(name, patterns, "a list of regular expressions")
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(name, pattern, f"a regular expression ({error})") from error
        for pattern, type in self.overrides.items():
            if type not in BLOCKS:
                raise ConfigError(f"overrides[{pattern!r}]", type, ", ".join(BLOCKS))

    def wants(self, name: str) -> bool:
        """Whether the module `name` may be packed."""
        if self.include is not None and not any(re.search(pattern, name) for pattern in self.include):
            return False
        return not any(re.search(pattern, name) for pattern in self.exclude or ())

    def override(self, name: str) -> str | None:
        """The type that an override gives to `name`."""
        return next((type for pattern, type in self.overrides.items() if re.search(pattern, name)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a packed linear can take its place: subclasses may do more than multiply, Falcon's does not."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_embedding(module: nn.Module) -> bool:
    """Whether a packed embedding can take its place: plain ones, and Gemma's that scale what they give.

    Not one with more parameters, as T5Gemma 2's, which has a row of its own for the end of an image.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if type(module) is nn.Embedding:
        return True
    return hasattr(module, "embed_scale") and [name for name, _ in module.named_parameters()] == ["weight"]


def types_of(model: nn.Module, choice: Choice) -> dict[str, str]:
    """Name -> block type of what `choice` packs: modules, one type for those that share a tensor; experts' parameters.

    Raises:
        ConfigError: an override's type does not fit a module's columns; overrides that differ for one tensor;
            rules by which nothing is packed.
    """
    shape = shape_of(model.config)
    found: dict[str, str] = {}
    forced: dict[str, str] = {}
    dense = left_dense(model)
    for name, size in _candidates(model):
        if name in dense or not choice.wants(name):
            continue
        asked = choice.override(name)
        if asked is not None:
            packed_columns(size[-1], asked)
            forced[name] = asked
        kind = asked or tensor_type(name, size, choice.mix, shape)
        if kind is not None:
            found[name] = kind
    _share(model, found, forced)
    if not found:
        rules = {"include": choice.include, "exclude": choice.exclude}
        raise ConfigError(
            "include", rules, "rules that name modules which are still dense, and whose columns a block fits"
        )
    _tell_of_dense(model, choice, found)
    return found


def _tell_of_dense(model: nn.Module, choice: Choice, found: Mapping[str, str]) -> None:
    """Log the large matrices that stay dense though the rules are for them: other kinds of layers, experts whose
    layout is not `experts.py`'s, columns that no block fits, weights that the model's code looks at."""
    left = {
        name: part.numel() * part.element_size()
        for name, part in model.named_parameters()
        if part.dim() in (2, 3) and part.numel() >= LARGE and part.is_floating_point()
        and name.removesuffix(".weight") not in found and not kept(name) and choice.wants(name.removesuffix(".weight"))
    }  # fmt: skip
    if left:
        logger.warning(
            "%d matrices stay dense, %.2f GB: %s …", len(left), sum(left.values()) / 1e9, next(iter(left))
        )  # fmt: skip


def _candidates(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape of the weight) of what could be packed."""
    for name, module in model.named_modules():
        if is_linear(module) or is_embedding(module):
            shape = tuple(module.weight.shape)
            yield name, shape[::-1] if isinstance(module, Conv1D) else shape
        elif is_experts(module):
            yield from ((f"{name}.{part}", tuple(getattr(module, part).shape)) for part in PARTS)


def expect_(model: nn.Module, types: Mapping[str, str], dtype: torch.dtype, packed: bool) -> None:
    """Put empty packed modules on the meta device in the places that `types` names, for a loader to fill.

    Args:
        model: changed in place.
        types: from `types_of`.
        dtype: of what embeddings give.
        packed: see `linear.py`.

    Raises:
        ConfigError: columns that do not fit a type's block, a type for a module that is no linear or embedding.
    """
    for name, type in types.items():
        experts = experts_part(model, name)
        if experts is None and not (is_linear(place := model.get_submodule(name)) or is_embedding(place)):
            raise ConfigError("quantization_config.types", name, "linears and embeddings, or parameters of experts")
        with torch.device("meta"):
            if experts is not None:
                owner, module, part = experts
                if not isinstance(module, GgufExperts):
                    module = GgufExperts(module)
                    model.set_submodule(owner, module)
                module.expect(part, type, packed)
            else:
                model.set_submodule(name, replacement(model.get_submodule(name), type, dtype, packed))


def _share(model: nn.Module, found: dict[str, str], forced: Mapping[str, str]) -> None:
    """One tensor is packed once: all modules that share it get one type, an override's or the head's, or none does."""
    for names in tied_groups(model):
        if not all(name in found for name in names):
            for name in names:
                found.pop(name, None)
            continue
        asked = {forced[name] for name in names if name in forced}
        if len(asked) > 1:
            raise ConfigError("overrides", sorted(asked), f"one type for {', '.join(names)}, which share a tensor")
        first = min(names, key=lambda name: _ENDS.get(role(name), len(_ENDS)))
        found.update(dict.fromkeys(names, asked.pop() if asked else found[first]))


def replacement(module: nn.Module, type: str, dtype: torch.dtype, packed: bool) -> GgufLinear | GgufEmbedding:
    """An empty packed module in the place of `module`, on the current default device.

    It counts as initialized: transformers would draw values for one whose weight no checkpoint has, and cannot draw
    blocks (`settle` finds such weights).
    """
    new = _replacement(module, type, dtype, packed)
    new._is_hf_initialized = True  # type: ignore[assignment]
    return new


def _replacement(module: nn.Module, type: str, dtype: torch.dtype, packed: bool) -> GgufLinear | GgufEmbedding:
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "scalar_embed_scale", None)
        if scale is None and hasattr(module, "embed_scale"):
            scale = float(module.embed_scale)  # type: ignore[arg-type]
        rounded = isinstance(getattr(module, "embed_scale", None), torch.Tensor)
        return GgufEmbedding(
            module.num_embeddings, module.embedding_dim, type, dtype, scale, module.padding_idx, packed, rounded
        )
    if isinstance(module, Conv1D):  # GPT-2's linear, whose dense weight is (inputs, outputs)
        new = GgufLinear(module.nx, module.nf, True, type, packed)
        new.transposed = True
        return new
    return GgufLinear(module.in_features, module.out_features, module.bias is not None, type, packed)  # type: ignore[arg-type]
