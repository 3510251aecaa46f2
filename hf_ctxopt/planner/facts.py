"""What a plan needs to know of a model: its layers' keys and values, its matrices, its trained length.

Read from a config, with the model on the meta device, or from a model as it stands. Nothing is downloaded or loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..models.layerwise import largest, layer_values
from ..models.lengths import length_limit, rope_sets, trained_length
from ..models.readers import check_reads
from ..weights.linear import GgufLinear
from ..weights.mixes import Shape
from ..weights.shapes import meta_model, shape_of, weights_of
from ..weights.stored import DENSE, UNPACKED, is_packed, method_of, stored_of, stored_scheme
from .configs import broken, config_at, config_of, gguf_file, reason
from .held import held_bytes, item_of
from .layers import LayerShape, layer_shapes

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""What configs call the experts that a token goes through."""


@dataclass(frozen=True)
class Matrix:
    """One parameter.

    Args:
        name: as `named_parameters` gives it.
        shape: (..., columns).
        linear: whether it is a linear layer's, which transformers' quantizers take.
        packable: whether GGUF blocks can take its place (`weights/selection.py`).
        table: whether rows of it are looked up, so that a token does not read it all.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool
    packable: bool
    table: bool = False

    @property
    def numel(self) -> int:
        """Its weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)  # by identity: what is worked out of them is kept (`schemes.py`)
class ModelFacts:
    """A model as the planner sees it.

    Args:
        name: what it was given as, or its type.
        source: the folder or file to load it from; `None` for a config or a model.
        groups: its attention layers by what they keep.
        matrices: every parameter once.
        shape: what the mixes' rules look at.
        trained: tokens that it was trained on; `None` if its config does not say.
        window_limit: most tokens that sinks and window may hold together; `None` if nothing may leave.
        layers, hidden, inner, heads, vocab: sizes; `inner` of the feed-forward layers, `heads` of queries.
        active: share of the experts' weights that a token reads.
        item: bytes of an element of K and V.
        loaded: bytes of (layers, embedding, head) of a model that is loaded, on its device; `None` for a config.
        packed: whether the weights of a loaded model are not plain matrices.
        foreign: whether they are packed, and other kernels than ours multiply with them.
        stored: scheme that the checkpoint's weights are packed as; `None` for plain ones or a model.
        unpacked: method of a checkpoint that is unpacked to 16 bits while it loads (`weights/stored.py`).
        other_layers: layers with a state of their own kind (linear attention), which is not counted.
    """

    name: str
    source: str | None
    groups: tuple[LayerShape, ...]
    matrices: tuple[Matrix, ...] = field(repr=False)
    shape: Shape
    trained: int | None
    window_limit: int | None
    layers: int
    hidden: int
    inner: int
    heads: int
    vocab: int
    active: float = 1.0
    item: int = 2
    loaded: tuple[int, int, int] | None = None
    packed: bool = False
    foreign: bool = False
    stored: str | None = None
    unpacked: str | None = None
    other_layers: int = 0

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.shape.tied

    @property
    def repackable(self) -> bool:
        """Whether other weights than `stored` can be made of it: a `.gguf` file's are unpacked for that."""
        return self.stored is None or (self.source or "").endswith(".gguf")


def facts_of(model: Any) -> ModelFacts:
    """What the planner needs to know of `model`.

    Args:
        model: a transformers model or config, a dictionary with `model_type`, or the path of a folder with a
            `config.json`, of such a file, or of a `.gguf` file; facts that were read before. Any other text goes to
            transformers as a Hub id.

    Raises:
        ConfigError: there is no such model or config.
        UnsupportedModelError: its keys and values are not those of attention heads that pages can hold; or its
            checkpoint is packed in a form whose bytes are not known here.
    """
    from torch import nn

    if isinstance(model, ModelFacts):
        return model
    if isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "get_text_config"):
        return _facts(model.config, model, None)
    source = None
    if isinstance(model, str | Path):
        source = str(Path(model).parent if Path(model).name == "config.json" else model)
        file = gguf_file(str(model))
        model = config_at(str(model), file)
        if file is not None:
            return _facts(model, None, source, file.mix)
    elif isinstance(model, Mapping):
        model = config_of(model)
    if not hasattr(model, "get_text_config"):
        raise ConfigError("model", type(model).__name__, "a transformers model or config, a dictionary or a path")
    stored = stored_of(model)
    method, scheme = method_of(stored)[0], stored_scheme(stored)
    if scheme is None and method not in DENSE:
        raise UnsupportedModelError(
            f"{model.model_type}: its checkpoint is stored as {method} in a form whose bytes are not known here; load "
            "it, and plan for the model as it stands: patch_model(model)"
        )
    found = _facts(model, None, source, scheme)
    return replace(found, unpacked=method) if method in UNPACKED else found


def _facts(config: Any, model: Any, source: str | None, stored: str | None = None) -> ModelFacts:
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type}: encoder-decoder models cannot be planned for")
    check_reads(config)
    if rank := largest(text, "kv_lora_rank"):
        raise UnsupportedModelError(
            f"{text.model_type}: multi-head latent attention stores compressed states (kv_lora_rank="
            f"{rank}), whose size in this cache is not what its config says; it cannot be planned for"
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        values = layer_values(text, name)
        if not values or not all(isinstance(value, int) for value in values):
            raise UnsupportedModelError(f"{text.model_type}: its config has no {name}, so it cannot be planned for")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim"):
        for size in layer_values(text, name):
            if isinstance(size, int) and size < 1:
                raise ConfigError(name, size, f"an integer >= 1 in the config of {text.model_type}")
    module = model if model is not None else _meta(config)
    groups, others = layer_shapes(text, module)
    experts = float(shape_of(config).experts)
    chosen = float(next((count for name in _CHOSEN if (count := largest(text, name))), experts))
    hidden = largest(text, "hidden_size")
    inner = largest(text, "intermediate_size") or largest(text, "n_inner") or 4 * hidden
    narrow = largest(text, "moe_intermediate_size")
    trained, packed = trained_length(text), model is not None and is_packed(model)
    return ModelFacts(
        name=source or str(getattr(config, "_name_or_path", "") or config.model_type), source=source, groups=groups,
        matrices=_matrices(module), shape=shape_of(config), trained=trained, window_limit=_window_limit(text, trained),
        layers=int(text.num_hidden_layers), hidden=hidden, inner=max(inner, int(narrow * chosen)),
        heads=largest(text, "num_attention_heads"), vocab=int(text.vocab_size), active=min(1.0, chosen / experts),
        item=2 if model is None else item_of(model), loaded=None if model is None else held_bytes(model),
        packed=packed, foreign=packed and not any(isinstance(part, GgufLinear) for part in model.modules()),
        stored=stored, other_layers=others,
    )  # fmt: skip


def _meta(config: Any) -> Any:
    """The model on the meta device.

    Raises:
        UnsupportedModelError: transformers has no model of that type that generates text, or cannot build it.
    """
    try:
        return meta_model(config)
    except broken() as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build it from its config ({reason(error)})"
        ) from error


def _matrices(module: Any) -> tuple[Matrix, ...]:
    from torch import nn

    from ..weights.experts import PARTS, is_experts
    from ..weights.precise import left_dense
    from ..weights.selection import is_embedding, is_linear

    linear, packable, tables = set(), set(), set()
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D":
            linear.add(f"{name}.weight")
        if isinstance(part, nn.Embedding):
            tables.add(f"{name}.weight")
        if is_linear(part) or is_embedding(part):
            packable.add(f"{name}.weight")
        elif is_experts(part):
            packable.update(f"{name}.{own}" for own in PARTS)
    packable -= {f"{name}.weight" for name in left_dense(module)}
    return tuple(
        Matrix(name, tuple(shape), name in linear, name in packable, name in tables)
        for name, shape in weights_of(module)
    )


def _window_limit(text: Any, trained: int | None) -> int | None:
    """Tokens that may be held while others go: the trained length, less where rotation rescales with the length."""
    if (not rope_sets(text) and not hasattr(text, "rope_theta")) or getattr(text, "alibi", False):
        return None  # learned or relative positions: what leaves cannot be made up for
    limits = [(length_limit(text) or 0) - 1, trained or 0]
    return min((limit for limit in limits if limit > 0), default=None)
