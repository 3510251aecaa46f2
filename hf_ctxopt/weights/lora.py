"""LoRA adapters of PEFT on packed linears.

`get_peft_model` takes a `GgufLinear` for the `nn.Linear` that it is: adapters run and train over the frozen blocks.
Only merging needs to know of the blocks; `packed_lora` registers a layer that does, by PEFT's own door for custom
layers (`LoraConfig._register_custom_module`).
"""

from __future__ import annotations

from typing import Any

from .linear import GgufLinear


def packed_lora(config: Any) -> Any:
    """Let adapters on packed linears be merged: `merge_and_unload` dequantizes, merging in place is refused in words.

    Args:
        config: a `peft.LoraConfig`, changed in place.

    Returns:
        `config`, for `get_peft_model`.

    Raises:
        CtxoptError: the package `peft` is missing.
    """
    from .lora_layer import GgufLora

    config._register_custom_module({GgufLinear: GgufLora})
    return config
