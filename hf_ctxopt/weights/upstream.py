"""The names of transformers that reading and writing `.gguf` files rests on, looked up in one place.

They are not part of its documented interface; 5.17 and 5.24 have them. Where one is gone, the first use says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CompatibilityError

_MODULE = "transformers.modeling_gguf_pytorch_utils"


def _get(name: str) -> Any:
    import importlib

    import transformers

    try:
        return getattr(importlib.import_module(_MODULE), name)
    except (ImportError, AttributeError) as error:
        raise CompatibilityError(
            f"transformers {transformers.__version__} has changed: {_MODULE}.{name} is gone. hf_ctxopt supports "
            "transformers >=5.17,<6; please report this with the version above"
        ) from error


def processors() -> Mapping[str, Any]:
    """llama.cpp architecture -> class that undoes what llama.cpp's converter did to the values."""
    table: Mapping[str, Any] = _get("TENSOR_PROCESSORS")
    return table


def plain_processor() -> Any:
    """The class for architectures whose values were not touched."""
    return _get("TensorProcessor")


def name_map() -> Callable[..., dict[str, str]]:
    """`(model, processor) -> {llama.cpp tensor name: parameter name}`."""
    function: Callable[..., dict[str, str]] = _get("get_gguf_hf_weights_map")
    return function


def config_keys() -> Mapping[str, Mapping[str, str | None]]:
    """transformers architecture -> {llama.cpp metadata key: config field, or `None` where it is ignored}."""
    table: Mapping[str, Mapping[str, str | None]] = _get("GGUF_CONFIG_MAPPING")
    return table
