"""As what a checkpoint's weights are packed, from its config."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError
from .config import METHOD
from .mixes import MIXES
from .others import OTHERS

UNPACKED = ("fp8", "mxfp8", "mxfp4")
"""Methods whose weights transformers unpacks to 16 bits while it loads, where it is told to.

Untold, it unpacks them by itself where the device or a package is wanting (fp8 below compute capability 8.9, mxfp4
below 7.5, without Triton or `kernels`, and on a CPU): what is held would depend on the machine.
"""
DENSE = (None, "gguf", *UNPACKED)
"""Methods of checkpoints that are loaded as 16 bits. transformers leaves its mark `gguf` on models it has unpacked."""


def stored_of(config: Any) -> Any:
    """The `quantization_config` of a model's config, or of its text part; `None` for a dense checkpoint."""
    own = getattr(config, "quantization_config", None)
    return own if own is not None else getattr(config.get_text_config(decoder=True), "quantization_config", None)


def is_packed(model: Any) -> bool:
    """Whether a matrix of a model that is loaded is stored as integers."""
    return any(part.dim() > 1 and not part.is_floating_point() for part in model.parameters())


def unpacking(config: Any) -> bool:
    """Have transformers unpack what is loaded with `config`, if its method allows that; else `False`."""
    stored = stored_of(config)
    if method_of(stored)[0] not in UNPACKED:
        return False
    values = stored if isinstance(stored, dict) else stored.to_dict()
    config.quantization_config = {**values, "dequantize": True}
    return True


def method_of(stored: Any) -> tuple[str | None, str | None]:
    """The quantization method of a config and, of our own, the mix.

    Args:
        stored: the `quantization_config`, `None` for a dense checkpoint.

    Raises:
        ConfigError: it is no quantization config.
    """
    if stored is None:
        return None, None
    if not isinstance(stored, dict) and not hasattr(stored, "quant_method"):
        raise ConfigError("quantization_config", stored, "a dictionary with a quant_method")
    values = stored if isinstance(stored, dict) else vars(stored)
    method = values.get("quant_method")
    if method is None:
        return None, None
    return str(getattr(method, "value", method)), values.get("mix") if method == METHOD else None


def stored_scheme(stored: Any) -> str | None:
    """The scheme of the checkpoint, a key of `MIXES` or `OTHERS`; `None` where it is dense or its format has no name.

    Args:
        stored: the `quantization_config`, `None` for a dense checkpoint.
    """
    method, mix = method_of(stored)
    if mix in MIXES:
        return mix
    names = [name for name, row in OTHERS.items() if row.method == method]
    if not names:
        return None
    values = stored if isinstance(stored, dict) else vars(stored)
    said = " ".join(f"{key}={value}" for key, value in values.items() if value not in (None, False)).lower()
    if (bits := re.search(r"\b(?:n?bits|w_bit)'?[=:] ?(\d+)", said)) is not None:
        return next((name for name in names if OTHERS[name].bits == int(bits[1])), None)
    eight = any(word in said for word in ("load_in_8bit", "int8", "float8"))
    return next((name for name in names if (OTHERS[name].bits == 8) is eight), names[0])
