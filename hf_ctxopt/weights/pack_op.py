"""The step of transformers' loader that packs a weight; apart, as its base class is loaded after the quantizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..errors import ConfigError
from .codecs import encode_searched
from .experts import packed_type
from .mapped import release


class PackOp(ConversionOps):
    """Packs one weight; the loader hands over the tensors one by one."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # 5.17 and 5.24 name different arguments; all come by keyword
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        """{pattern: weight} to {parameter: blocks}; a fused tensor of a checkpoint comes as the several that it holds,
        by their names."""
        found = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            full = name if len(input_dict) > 1 else full_layer_name
            module, parameter = get_module_from_name(model, full)
            type = packed_type(module, parameter)
            if type is None and len(input_dict) == 1:
                raise ConfigError("parameter", full, "one that is to be packed")
            if type is None:  # beside one that is
                found[full] = weight
                continue
            try:
                found[full] = encode_searched(weight.T if getattr(module, "transposed", False) else weight, type)
            except ConfigError as error:  # transformers would catch it, and end in an error that names nothing
                self.hf_quantizer.refused.append(ConfigError(full, error.value, error.allowed))
            # Not the pages of experts, which were put together from several tensors: nobody knows those here.
            release(weight, self.hf_quantizer.files)
        return found
