"""A clear refusal where PEFT would add an adapter to packed bytes.

PEFT takes a packed linear for the `nn.Linear` that it is by type, and merging would end in an error about shapes. It
has no door for a base layer to object, so its merge is given one check, once PEFT is loaded; nothing else changes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from .linear import GgufLinear

REFUSAL = (
    "adapters cannot be merged into packed weights, which would round them away; keep them beside the model "
    "(save_pretrained of PEFT), or give get_peft_model the config `hf_ctxopt.packed_lora(config)`, with "
    "which merge_and_unload() leaves dense linears in their place"
)
_MARK = "_ctxopt_checked"


def guard_merging() -> None:
    """Give PEFT's merge the check, if PEFT is loaded and has not got it."""
    layer: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)
    if layer is not None and not hasattr(layer.merge, _MARK):
        layer.merge = _checked(layer.merge)


def _checked(merge: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(merge)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.get_base_layer(), GgufLinear):
            raise UnsupportedModelError(REFUSAL)
        merge(self, *args, **kwargs)

    setattr(checked, _MARK, True)
    return checked
