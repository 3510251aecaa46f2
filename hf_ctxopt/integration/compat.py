"""Every private name of transformers that we rely on, checked in one place.

When transformers changes one of them, the first use of hf_ctxopt says which, instead of failing somewhere in
a forward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ..errors import CompatibilityError

PREPARE_CACHE = "_prepare_cache_for_generation"
_PREPARE_ARGUMENTS = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")
OUTPUT_HOOKS = "transformers.utils.output_capturing"  # module of the hooks behind `output_hidden_states` and its like
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before it
_LAYER_METHODS = ("update", "get_mask_sizes", "get_seq_length", "get_max_length", "reset", "reorder_cache")


def _need(found: bool, what: str) -> None:
    if not found:
        import transformers

        raise CompatibilityError(
            f"transformers {transformers.__version__} has changed: {what}. hf_ctxopt supports transformers >=5.17,<6; "
            "please report this with the version above"
        )


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Name of the parameter that takes the cache; `None` if there is none. Remote code may still use the old name."""
    names = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in names), None)


@functools.cache
def generate_argument() -> str:
    """Name under which `generate` takes the cache, and its output gives it back."""
    from transformers.generation.utils import GenerationMixin

    name = cache_argument(GenerationMixin.prepare_inputs_for_generation)
    _need(name is not None, "GenerationMixin.prepare_inputs_for_generation takes no cache")
    return str(name)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call or the fields of an output; `None` if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def check_configuration(module: ModuleType) -> None:
    """`transformers.generation.configuration_utils` has the tuple of cache names that `validate` reads."""
    names = getattr(module, "ALL_CACHE_IMPLEMENTATIONS", None)
    _need(isinstance(names, tuple), "generation.configuration_utils.ALL_CACHE_IMPLEMENTATIONS is not a tuple")


def check_generation(module: ModuleType) -> None:
    """`transformers.generation.utils` prepares caches where we wrap it."""
    method = getattr(getattr(module, "GenerationMixin", None), PREPARE_CACHE, None)
    _need(callable(method), f"GenerationMixin.{PREPARE_CACHE} is gone")
    parameters = list(inspect.signature(inspect.unwrap(method)).parameters.values())[1:]  # type: ignore[arg-type]
    found = tuple(parameter.name for parameter in parameters)
    wrapped = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)  # by somebody else
    _need(wrapped or found == _PREPARE_ARGUMENTS, f"GenerationMixin.{PREPARE_CACHE} takes {found}")
    for name in ("_prefill", "_sample", "_beam_search", "_assisted_decoding"):
        _need(callable(getattr(module.GenerationMixin, name, None)), f"GenerationMixin.{name} is gone")
    prefill = inspect.unwrap(module.GenerationMixin._prefill)
    names = tuple(inspect.signature(prefill).parameters)[1:4]
    _need(names == ("input_ids", "generation_config", "model_kwargs"), f"GenerationMixin._prefill takes {names}")
    _need(hasattr(module.GenerationMixin, "_supports_default_dynamic_cache"),
          "GenerationMixin._supports_default_dynamic_cache is gone")  # fmt: skip


def check_registry(interface: Any, name: str) -> None:
    """An attention or mask interface can be extended and restored."""
    _need(isinstance(getattr(interface, "_global_mapping", None), dict), f"{name}._global_mapping is not a dict")


def check_caches(module: ModuleType) -> None:
    """`transformers.cache_utils` has the layer contract that `PageLayer` fulfils."""
    layer = getattr(module, "CacheLayerMixin", None)
    for method in _LAYER_METHODS:
        _need(hasattr(layer, method), f"CacheLayerMixin.{method} is gone")
    for method in ("get_query_offset", "activate_past_recording", "crop"):
        _need(hasattr(module.Cache, method), f"Cache.{method} is gone")
