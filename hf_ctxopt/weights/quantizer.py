"""In-situ packing inside `from_pretrained`: each weight is packed as it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..errors import ConfigError, UnsupportedModelError
from .blocks import BLOCKS
from .checkpoint import settle, types_in
from .conversions import keep_apart, without_mixed
from .dtype_mark import mark_dtype
from .experts import packed_type
from .mapped import real_paths
from .merging import guard_merging
from .selection import expect_, types_of
from .told import tell


class GgufQuantizer(HfQuantizer):
    """transformers' side of `GgufQuantConfig`."""

    requires_calibration = False
    files: frozenset[str] = frozenset()  # what is loaded from; the loader's views of them are nobody else's
    dtype = torch.float32  # of the model, once it is being loaded
    loading: Any = None  # the model, while it is
    refused: list[ConfigError]  # weights that could not be packed

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        self.files = real_paths(checkpoint_files)
        if self.pre_quantized:
            if not config.types:
                raise ConfigError("quantization_config.types", config.types, "the block type of each packed module")
            unknown = sorted(set(config.types.values()) - set(BLOCKS))
            if unknown:
                raise ConfigError("quantization_config.types", unknown, ", ".join(BLOCKS))
            config.types = types_in(model, config.types)
        else:
            config.types = types_of(model, config.choice())
        dtype = getattr(model.config, "dtype", None) or torch.get_default_dtype()
        expect_(model, config.types, dtype, packed=self.pre_quantized)
        self.dtype = dtype
        self.loading, self.refused = model, []
        model.config.quantization_config = config
        guard_merging()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.loading = None
        if self.refused:
            raise self.refused[0]
        settle(model)
        mark_dtype(model, self.dtype)
        tell(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader must pack this parameter."""
        module, name = get_module_from_name(model, param_name)
        return packed_type(module, name) is not None and not self.pre_quantized

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight, for whoever plans where modules go."""
        module, name = get_module_from_name(model, param_name)
        type = packed_type(module, name)
        if type is not None:
            return 1.0 if self.pre_quantized else BLOCKS[type].bits / 8
        return float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> Any:
        """What the loader calls for each such parameter."""
        from .pack_op import PackOp

        return PackOp(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Which tensors of the checkpoint are cut into several; 5.17 does not say of which model."""
        model = self.loading if model is None else model
        found = [*weight_conversions, *self.get_weight_conversions()]  # type: ignore[no-untyped-call]
        return without_mixed(found, model) if self.pre_quantized else found

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """transformers asks before it saves; its own way of saving serves."""
        keep_apart(model)
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the blocks."""
        return True

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """transformers' `model.dequantize()`; refused, as the dense modules' own classes are not kept."""
        raise UnsupportedModelError(
            "a packed model cannot be turned into a dense one in place: load the dense checkpoint, or read single "
            "weights with the `dequantize` of a packed module"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
