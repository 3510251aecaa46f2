"""Numbers of a config whose layers may differ: a list, or a value of each layer's own.

Gemma 3n lists the width of each feed-forward layer; Gemma 4 gives its full layers other heads than the sliding ones,
and transformers refuses to read such an attribute of the whole config (`per_layer_config` has each layer's).
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def layer_values(config: Any, name: str) -> list[Any]:
    """The values of an attribute: one for each layer where they may differ, else the only one; none if it is not set.

    Args:
        config: a transformers config of a decoder.
        name: the attribute's.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # the layers differ
        if not getattr(config, "is_heterogeneous", False):
            raise
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def layer_value(config: Any, name: str, layer: int) -> Any:
    """The value of one layer; `None` if it is not set."""
    values = layer_values(config, name)
    if not values:
        return None
    return values[layer] if len(values) > 1 else values[0]


def largest(config: Any, name: str) -> int:
    """The largest number that a layer has; 0 if it is not set. Raises `ConfigError`: a layer has no whole number."""
    values = [value for value in layer_values(config, name) if value is not None]
    for value in values:
        if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer()):
            raise ConfigError(
                name, value, f"a whole number in the config of {getattr(config, 'model_type', 'a model')}"
            )
    return max(map(int, values), default=0)
