"""Tensors that a checkpoint holds as one, where the model's parts of it are packed as different types.

transformers cuts a fused tensor (HRM's `gqkv_proj`) when it loads and joins the parts again when it saves. Rows of two
types, or of blocks and of floats, do not make one tensor. Such a packed model keeps the parts apart in its checkpoint;
whether it does follows from the types alone, which loading and saving both know.
"""

from __future__ import annotations

from typing import Any

from .experts import packed_type


def without_mixed(conversions: list[Any], model: Any) -> list[Any]:
    """transformers' `WeightTransform`s less those that join parts of different types when they are reversed."""
    return [conversion for conversion in conversions if not _mixes(conversion, model)]


def keep_apart(model: Any) -> None:
    """Before saving: `model` forgets conversions that cannot be reversed, in itself or of its family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    own = getattr(model, "_weight_conversions", None)
    if own is None:  # as `revert_weight_conversion` finds them
        own = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    left = without_mixed(own, model)
    if len(left) < len(own):
        model._weight_conversions = left


def _mixes(conversion: Any, model: Any) -> bool:
    if len(conversion.target_patterns) < 2:
        return False
    joining = conversion.reverse_transform()
    types: dict[str, str | None] = {}  # of each fused tensor
    for name, _ in model.named_parameters():
        fused, pattern = joining.rename_source_key(name)
        if pattern is not None:
            owner, _, leaf = name.rpartition(".")
            kind = packed_type(model.get_submodule(owner), leaf)
            if types.setdefault(fused, kind) != kind:
                return True
    return False
