"""As what a checkpoint's weights are packed, from its config."""

from __future__ import annotations

from typing import Any

from .config import METHOD
from .mixes import MIXES
from .others import OTHERS


def method_of(stored: Any) -> tuple[str | None, str | None]:
    """The quantization method of a config and, of our own, the mix.

    Args:
        stored: the `quantization_config`, `None` for a dense checkpoint.
    """
    if stored is None:
        return None, None
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
    if len(names) < 2:
        return names[0] if names else None
    values = stored if isinstance(stored, dict) else vars(stored)
    said = " ".join(f"{key}={value}" for key, value in values.items() if value not in (None, False)).lower()
    eight = any(word in said for word in ("load_in_8bit", "int8", "nbits': 8", "nbits=8"))
    return next(name for name in names if ("8" in name) is eight)
