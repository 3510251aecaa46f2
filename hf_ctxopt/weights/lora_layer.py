"""PEFT's adapter on a packed linear; needs PEFT. See `lora.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import CtxoptError, UnsupportedModelError
from .merging import REFUSAL

try:
    from peft.tuners.lora.layer import Linear as _Lora
except ImportError as error:
    raise CtxoptError("this needs the package peft: pip install peft") from error


class GgufLora(_Lora):  # type: ignore[misc, unused-ignore]
    """PEFT's adapter of a linear, on a packed one."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: blocks cannot take an adapter in. Raises `UnsupportedModelError`."""
        raise UnsupportedModelError(REFUSAL)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes this layer's place: the packed linear, or, merged, a dense one in the adapters' dtype."""
        base: Any = self.get_base_layer()
        names = [name for name in (adapter_names or self.active_adapters) if name in self.lora_A]
        if not merge or not names:
            return base  # type: ignore[no-any-return]
        dtype: Any = self.lora_A[names[0]].weight.dtype
        with torch.device(base.weight.device):
            dense = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=dtype)
        # PEFT's own merge, so that its variants count: the adapter is moved onto the dense weight first.
        dense.weight = nn.Parameter(base.dequantize(dtype), requires_grad=False)
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.to(dtype), requires_grad=False)
        self.base_layer = dense
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)
        except BaseException:  # an interrupt too
            self.base_layer = base
            raise
        return dense
