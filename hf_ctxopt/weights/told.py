"""What transformers is told of a packed model, alike whether it was packed while loading or in memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_FLAG = "_is_quantized"  # of a config; FlashAttention's casts ask for it, where a packed weight's dtype would mislead


def tell(model: nn.Module) -> None:
    """Mark the configs of `model` as those of a quantized one, but for the mixers whose weights stay dense.

    Jamba's and FalconMamba's mixers multiply with `dt_proj` themselves, or, if the config is marked, take the bias off
    the layer's result again, which costs bfloat16 half its digits. `precise.py` leaves that layer dense, so they need
    not: they get a config of their own, without the mark.
    """
    from transformers import PreTrainedModel  # this module is loaded in the middle of transformers' own loading

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module.config, _FLAG, True)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if type(getattr(module, "dt_proj", None)) is nn.Linear and hasattr(config, _FLAG):
            own = copy.copy(config)
            delattr(own, _FLAG)
            module.config = own
