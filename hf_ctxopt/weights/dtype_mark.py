"""The dtype of a packed model, where none of its floating parameters would tell it.

transformers takes a model's dtype from its first floating parameter, and `save_pretrained` writes it into the config.
Once embeddings are packed, that may be a router which is kept in float32, and the model would come back in float32; or
there may be none at all (OLMo, whose norms have no weights), which ends in a bare StopIteration. An empty parameter of
the model itself comes before all others, on the device of the one that was first: `model.device` asks that too. It
follows `model.to(dtype)`, and is no part of a state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "ctxopt_dtype"


def mark_dtype(model: Any, dtype: torch.dtype) -> None:
    """See to it that `model.dtype` is `dtype`; nothing is added where it is already."""
    told = next((part.dtype for part in model.parameters() if part.is_floating_point()), None)
    if told is dtype:
        return
    device = next((part.device for part in model.parameters()), torch.device("cpu"))
    mark = torch.empty(0, dtype=dtype, device=device)
    if NAME in model._parameters:
        model._parameters[NAME].data = mark
        return
    model.register_parameter(NAME, nn.Parameter(mark, requires_grad=False))
    # The root's own parameters come first in any case: they are walked before those of its parts.
    model.register_state_dict_post_hook(_left_out)
    model.register_load_state_dict_post_hook(_not_missed)


def _left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(prefix + NAME, None)


def _not_missed(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.rpartition(".")[2] != NAME]
