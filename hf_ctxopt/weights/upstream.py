"""The names of transformers that reading and writing `.gguf` files rests on, looked up in one place.

They are not part of its documented interface; 5.17 and 5.24 have them. Where one is gone, the first use says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import RLock
from typing import Any

from ..errors import CompatibilityError

_MODULE = "transformers.modeling_gguf_pytorch_utils"
_REPLACING = RLock()  # two threads must not put back each other's


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


def name_map(model: Any, processor: Any, architecture: str) -> dict[str, str]:
    """llama.cpp tensor name -> parameter name, for a model of `architecture`.

    transformers asks `gguf` for its table of names anew for each module of the model: half a minute for 30 layers.
    """
    function = _get("get_gguf_hf_weights_map")
    with _kept("get_tensor_name_map"):
        names: dict[str, str] = function(model, processor, model_type=architecture)
    return names


def reading_once() -> AbstractContextManager[None]:
    """While it lasts, `gguf` parses a file once: transformers has it done for the config and for the tokenizer."""
    return _kept("GGUFReader")


@contextmanager
def _kept(name: str) -> Iterator[None]:
    """For the time of the block, what the function `name` of `gguf` gives for the same arguments is kept."""
    import gguf

    with _REPLACING:
        made = getattr(gguf, name)
        setattr(gguf, name, cache(made))
        try:
            yield
        finally:
            setattr(gguf, name, made)


def config_keys() -> Mapping[str, Mapping[str, str | None]]:
    """transformers architecture -> {llama.cpp metadata key: config field, or `None` where it is ignored}."""
    table: Mapping[str, Mapping[str, str | None]] = _get("GGUF_CONFIG_MAPPING")
    return table
